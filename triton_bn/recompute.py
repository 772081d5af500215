"""``recompute``: outputs of batch normalization are made again in backward instead of being kept for it.

Batch normalization keeps its input x for backward, and whatever takes its output y (a convolution, a
linear layer, a pooling) keeps y as well, although y is a cheap function of x. Inside :func:`recompute`
whoever saves y is given a :class:`Recipe` instead, by PyTorch's saved-tensor hooks: when backward asks
for y, one launch makes it again, bit for bit.

A layer says after its call what its output is made of: :meth:`Recording.remember`. That is all that the
other files know of this one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Recipe", "Recording", "owned_copy", "recompute", "recording"]


@contextmanager
def recompute() -> Iterator[None]:
    """Around a forward: what the layers of this package return is not kept for backward, but made again.

    The gradients are bitwise the same. The price is one read and one write of every tensor that is made
    again. Running statistics advance once, in the forward.

    What is made again is the output of a call of one of the layers (or of
    :func:`triton_bn.functional.batch_norm`), the activation and the residual included that the call takes
    in. It is made again where all that it is made of is kept for backward anyway: the input always is in
    training; a residual is if it is no recomputed value itself, so that no chain grows. Kept as they are:
    what was changed in place since the layer returned it, and copies (the one that autocast makes of a
    float32 output for a convolution in bfloat16, say).

    Only the innermost saved-tensor hooks are asked, so this does nothing where others are active
    (``torch.utils.checkpoint``, ``save_on_cpu``) or hooks are disabled (``torch.func``), nor under
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace``. Such hooks entered inside win there. It
    holds for the thread that enters it.

    Example:
        >>> import torch, triton_bn
        >>> layer, head = triton_bn.BatchNorm1d(8, activation="silu"), torch.nn.Linear(8, 2)
        >>> with triton_bn.recompute():
        ...     loss = head(layer(torch.randn(64, 8))).square().mean()  # head keeps no output of layer's
        >>> loss.backward()
    """
    if not _applies():
        yield
        return
    record = Recording()
    _recordings.add(record)
    try:
        with saved_tensors_hooks(record.pack, _Saved.unpack):
            yield
    finally:
        _recordings.remove(record)


def _applies() -> bool:
    hooks: Any = torch._C._autograd
    return not _traced() and hooks._saved_tensors_hooks_is_enabled() and _innermost() is None


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _innermost() -> tuple[Any, Any] | None:
    """The hooks (pack, unpack) that are asked now."""
    # An argument that says whether to look past tracing.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def recording() -> Recording | None:
    """The record of this thread's :func:`recompute`, where it is in force for what is called now."""
    if not _recordings or not torch.is_grad_enabled() or _traced():
        return None
    hooks = _innermost()
    owner = None if hooks is None else getattr(hooks[0], "__self__", None)
    return owner if isinstance(owner, Recording) else None


#: Those of all threads: as long as there is none, nobody asks further.
_recordings: set[Recording] = set()


def owned_copy(parameter: Tensor | None) -> Tensor | None:
    """A parameter's values as they are now, for a recipe to own."""
    return None if parameter is None else parameter.detach().clone()


class Recording:
    """What has been saved for backward inside one ``with recompute():``, and what can be made again.

    Tensors are told by their storage, which is what views of them share. A weak reference to it keeps
    its address from being given to another.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._sweep_at = 256

    def pack(self, tensor: Tensor) -> _Saved:
        """The hook: what autograd keeps in the place of a tensor."""
        saved = _Saved(tensor)
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            return saved
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if entry is None:
            self._entries[storage._cdata] = entry = _Entry(storage)
            if len(self._entries) > self._sweep_at:
                self._sweep()
        if (
            entry.recipe is None
            or entry.version != saved.version
            or not saved.replace(entry.recipe)
        ):
            entry.kept.append(weakref.ref(saved))
        return saved

    def remember(self, output: Tensor, recipe: Recipe | None) -> None:
        """Says how ``output``, new memory that nobody has changed yet, is made again, if it is.

        Whoever has saved it already (an activation does as it runs) gets the recipe as well.
        """
        storage = output.untyped_storage()
        if (
            recipe is None
            or type(output) is not Tensor
            or not output.requires_grad
            or output.numel() == 0
            or storage.nbytes() != output.numel() * output.itemsize
        ):
            return
        entry = self._entries.setdefault(storage._cdata, _Entry(storage))
        recipe.describes(output)
        entry.recipe, entry.version = recipe, output._version
        for reference in entry.kept:
            saved = reference()
            if saved is not None and saved.version == entry.version:
                saved.replace(recipe)

    def keeps(self, tensor: Tensor) -> bool:
        """Whether somebody keeps the values of a tensor for backward, so that a recipe may, too."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry is not None and any(
            saved is not None and saved.recipe is None for saved in (kept() for kept in entry.kept)
        )

    def recipe(
        self, make: Callable[..., Tensor], *sources: Tensor | None, owned: tuple[Any, ...] = ()
    ) -> Recipe | None:
        """``make(*sources, *owned)`` as a recipe, or ``None`` where a source is not kept anyway."""
        if not all(source is None or self.keeps(source) for source in sources):
            return None
        return Recipe(make, sources, owned)

    def _sweep(self) -> None:
        """Forgets the tensors that are no more."""
        live = {key: entry for key, entry in self._entries.items() if not entry.storage.expired()}
        self._entries, self._sweep_at = live, 2 * len(live) + 256


_PLAIN = {Tensor, torch.nn.Parameter}


class _Entry:
    """What is known of one storage."""

    __slots__ = ("kept", "recipe", "storage", "version")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = StorageWeakRef(storage)
        #: How its values were made, as they were at that version.
        self.recipe: Recipe | None = None
        self.version = 0
        #: Who has saved it as it is.
        self.kept: list[weakref.ref[_Saved]] = []


class _Saved:
    """What autograd keeps: a tensor, or its recipe; and the version that PyTorch would have noted.

    Hooks switch PyTorch's own check of versions off, so it is made here.
    """

    __slots__ = ("__weakref__", "geometry", "recipe", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        #: Shares the version with the tensor; and its values, unless there is a recipe. Detached: an output
        #: that its own node keeps would be a circle.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.recipe: Recipe | None = None
        self.geometry: tuple[Any, ...] = ()

    def replace(self, recipe: Recipe) -> bool:
        """Lets go of the values; whether the recipe can make them."""
        tensor = self.tensor
        if tensor.dtype is not recipe.dtype or tensor.is_neg():
            return False
        self.geometry = (tensor.storage_offset(), tensor.size(), tensor.stride())
        self.recipe = recipe
        # Of the tensor nothing is left but the counter of its changes.
        tensor.data = recipe.nothing
        return True

    def unpack(self) -> Tensor:
        size = self.geometry[1] if self.recipe is not None else self.tensor.size()
        _require_version(self.tensor, self.version, size)
        return self.tensor if self.recipe is None else self.recipe.view(*self.geometry)


def _require_version(tensor: Tensor, version: int, size: torch.Size) -> None:
    """Raises what PyTorch raises for a saved tensor that was changed since."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(size)}] is at version {tensor._version}; expected version "
            f"{version} instead. Hint: enable anomaly detection to find the operation that failed to "
            "compute its gradient, with torch.autograd.set_detect_anomaly(True)."
        )


class Recipe:
    """How an output is made again: ``make(*sources, *owned)``.

    Args:
        sources: tensors of the output's size, which are kept for backward by others, too.
        owned: all else, tensors of size C that nobody else may change or free: a parameter may be gone
            when backward asks.
    """

    __slots__ = (
        "_made",
        "_on",
        "dtype",
        "make",
        "nothing",
        "owned",
        "sources",
        "stream",
        "versions",
    )

    def __init__(
        self,
        make: Callable[..., Tensor],
        sources: tuple[Tensor | None, ...],
        owned: tuple[Any, ...],
    ) -> None:
        self.make, self.owned = make, owned
        self.sources = tuple(None if s is None else s.detach() for s in sources)
        self.versions = tuple(0 if s is None else s._version for s in sources)
        #: What has been made, while somebody holds it, and the stream where it is known to be ready.
        self._made: StorageWeakRef | None = None
        self._on: Any = None

    def describes(self, output: Tensor) -> None:
        """Notes what cannot be known before there is an output."""
        self.dtype, self.nothing = output.dtype, output.detach().new_empty(0)
        self.stream = _stream(output.device)

    def view(self, offset: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """The values, seen so. Made once for all who ask while one of them holds them."""
        here = _stream(self.nothing.device)
        storage = None
        if self._made is not None and self._on == here:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._made.cdata)
        if storage is None:
            storage = self._make(here)
            self._made, self._on = StorageWeakRef(storage), here
        return self.nothing.new_empty(0).set_(storage, offset, size, stride)

    def _make(self, here: Any) -> torch.UntypedStorage:
        for source, version in zip(self.sources, self.versions, strict=True):
            if source is not None:
                _require_version(source, version, source.size())
        if here != self.stream:  # whose memory the allocator would give away too early
            for tensor in (*self.sources, *self.owned):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(here)
        with torch.no_grad():
            return self.make(*self.sources, *self.owned).untyped_storage()


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
