"""One batch on many processes: what they exchange, and how they find out that they do not fit together.

The only caller of torch.distributed's collectives. A training step makes two for each layer: the
forward gathers a *row* of every rank, the backward adds up the ranks' sums::

    row   [2 * C + 2]  float64: mean and M2 of each channel, the count of values, a tag (the dtype)
    sums  [2, C]       float32, or float64 for float64 input: sum(g) and sum(g * (x - mean))

Rows are merged by Chan's rule (:func:`triton_bn.reference.merge`). In float64 they hold any count
exactly and, for inputs of up to 32 bits, all the digits by which two ranks' means differ.

Rows are of one length and dtype whatever the input's, so that ranks that disagree about anything but
the number of channels still meet in one collective, and learn it from the tags. As the numbers of
channels decide the length, they are compared beforehand: one more collective at the first step of
each layer in each group (:meth:`Ranks.agree`). A rank that raises before it has sent its row (its
arguments are wrong, or its memory is full) takes part nevertheless, with a tag that says so, and then
raises (:meth:`Ranks.together`); so all ranks raise, none waits for it, and the next step finds all of
them at the same place. A rank that raises later (behind the forward's collective, or in the backward)
leaves the others to the process group's timeout at the next one.

On a GPU nobody looks at a row, since that would make the host wait: there a device assertion says
what an exception says on a CPU. The collectives are queued in the current stream, so the host does
not wait for them either. There is no work to overlap them with: what of a layer's work needs no other
rank (the moments; dweight and dbias) comes out of the pass before the collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DISAGREE", "FAILED", "Ranks", "group_of"]

#: The tag of a rank that raises.
FAILED = -1

#: What is known on a GPU, where the rows are not looked at.
DISAGREE = (
    "SyncBatchNorm: the ranks disagree on the input's dtype, or a rank raised an error of its own, or there "
    "is one value per channel on all ranks together"
)


def group_of(process_group: Any) -> Any:
    """The group to synchronize over, the default one for ``None``.

    ``None`` where there is nobody to synchronize with, as in PyTorch: torch.distributed is not initialized,
    or the group has one member, or this process is none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


@dataclass
class Ranks:
    """The processes that share a batch of a layer with ``channels`` channels on ``device``: one step's."""

    group: Any
    channels: int
    device: torch.device
    #: Whether the numbers of channels are still to be compared.
    ask: bool
    #: Whether this rank's row is on its way, so that the others do not wait for it.
    sent: bool = False

    @classmethod
    def named(cls, name: str, x: Tensor, ask: bool) -> Ranks:
        """Those of the group of a name, for an input: operators take names, not groups."""
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
        return cls(group, x.shape[1], x.device, ask)

    def agree(self) -> None:
        """Compares the ranks' numbers of channels on the host, if that is still to be done.

        Raises:
            RuntimeError: on every rank, where they differ.
        """
        if not self.ask:
            return
        own = torch.tensor([self.channels], device=self.device)
        channels = self._gather(own).tolist()
        if len(set(channels)) > 1:
            raise RuntimeError(
                f"SyncBatchNorm: the ranks disagree on num_features: {_by_rank(channels)}"
            )
        self.ask = False

    def gather(self, row: Tensor) -> Tensor:
        """All ranks' rows (ranks, 2 * C + 2), in the ranks' order."""
        self.sent = True
        return self._gather(row).view(-1, row.numel())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises inside on one rank, before its row is sent, makes all ranks raise."""
        try:
            yield
        except Exception:
            if not self.sent:
                with suppress(RuntimeError):  # the error that is under way matters more
                    self.agree()
                    row = torch.zeros(
                        2 * self.channels + 2, dtype=torch.float64, device=self.device
                    )
                    row[-1] = FAILED
                    self.gather(row)
            raise

    def verify(
        self, rows: Tensor, dtypes: tuple[torch.dtype, ...], *, partly: bool = False
    ) -> None:
        """Looks at gathered rows on a CPU; a tag is an index of ``dtypes``.

        ``partly``: one value in all may take part by a mask.

        Raises:
            RuntimeError: on every rank, where a rank failed or the dtypes differ.
            ValueError: on every rank, where all of them together hold one value a channel.
        """
        counts, tags = rows[:, -2].tolist(), rows[:, -1].int().tolist()
        failed = [rank for rank, tag in enumerate(tags) if tag == FAILED]
        if failed:
            raise RuntimeError(
                f"SyncBatchNorm: rank {', '.join(map(str, failed))} of the group raised an error"
            )
        if len(set(tags)) > 1:
            names = [str(dtypes[tag]).removeprefix("torch.") for tag in tags]
            raise RuntimeError(
                f"SyncBatchNorm: the ranks disagree on the input's dtype: {_by_rank(names)}"
            )
        if sum(counts) == 1 and not partly:
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 on all ranks together"
            )

    def add(self, sums: Tensor) -> None:
        """Replaces the sums by those over all ranks."""
        dist.all_reduce(sums, group=self.group)

    def _gather(self, own: Tensor) -> Tensor:
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gathered = own.new_empty(dist.get_world_size(self.group) * own.numel())
        all_gather(gathered, own, group=self.group)
        return gathered


def _by_rank(values: list[Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
