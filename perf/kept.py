"""How many bytes a whole model keeps between forward and backward. Counted, on any machine; nothing is timed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Living", "kept_bytes"]


class Living(TorchDispatchMode):
    """Sees every tensor that operators return, and knows which of their memories are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                # A weak reference keeps its address from being given to another.
                self._seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return results

    def bytes(self, without: set[int]) -> int:
        """Of all that are still there, but for those of these addresses."""
        return sum(
            size
            for address, (memory, size) in self._seen.items()
            if address not in without and not memory.expired()
        )


def kept_bytes(model: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """What is in memory after ``model(x)`` beside parameters, buffers, x and the output; and the output."""
    with Living() as living:
        output = model(x)
    own = (*model.parameters(), *model.buffers(), x, output)
    return living.bytes({t.untyped_storage()._cdata for t in own}), output
