"""``convert`` a whole model: stock batch normalization becomes ours, and is fused with what follows.

A layer is converted by giving the very object another class, as PyTorch does when a lazy layer is
materialised. So nothing of it can get lost: parameters, buffers and hooks are what they were, and
whoever holds the layer (an optimizer, a Python list, another model) holds the converted one.

Everything is planned before anything is changed, and undone if a change fails half-way.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from triton_bn.conversion.derive import Refused, underneath
from triton_bn.conversion.fuse import FusingBehind, recomputes, recomputing
from triton_bn.conversion.replace import (
    ABSENT,
    FROM,
    LOCK,
    Behind,
    Change,
    Frozen,
    apply,
    frozen,
    rebased,
    replacements,
    thawed,
)
from triton_bn.conversion.search import Search
from triton_bn.modules import TWINS, SyncBatchNorm
from triton_bn.problem import require_module

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

__all__ = ["Report", "Row", "conversion_report", "convert", "revert"]

Model = TypeVar("Model", bound=nn.Module)

STOCK = {ours: stock for stock, ours in TWINS.items()}
OURS = tuple(STOCK)

#: On a converted model: its report.
_REPORT = "_conversion_report"


# ------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """What became of one batch normalization layer."""

    name: str
    #: Its class before and after.
    before: str
    after: str
    #: What is fused with it where kernels compute: ``"relu"``, ``"add"``, ``"add + relu"``, ...,
    #: ``"relu | silu"`` where that depends on the mode; or nothing: ``""``.
    fused: str = ""
    #: Why nothing is, or why it was left.
    note: str = ""

    def __str__(self) -> str:
        did = f"{self.before} becomes {self.after}" if self.before != self.after else "left"
        fused = self.fused and f", fused with {self.fused}"
        return f"{self.name or '(model)'}: {did}{fused}{self.note and f': {self.note}'}"


@dataclass(frozen=True)
class Report:
    """What :func:`convert` did; printed, a table."""

    rows: tuple[Row, ...]
    #: The modules that fuse what they call: their class is a subclass of what it was.
    rewritten: tuple[str, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.before != row.after)

    @property
    def fused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.fused)

    @property
    def left(self) -> tuple[Row, ...]:
        """The layers that are what they were."""
        return tuple(row for row in self.rows if row.before == row.after and not row.fused)

    def __str__(self) -> str:
        cells = [("layer", "was", "is", "fused with", "note")]
        for row in self.rows:
            cells.append((row.name or "(model)", row.before, row.after, row.fused or "-", row.note))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{len(self.rows)} layers: {len(self.replaced)} replaced, {len(self.fused)} fused, "
            f"{len(self.left)} left"
        )
        if self.rewritten:
            names = (name or "(model)" for name in self.rewritten)
            lines.append(f"they are fused by: {', '.join(names)}")
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> Report:
    """The report of the last :func:`convert` of ``model``. It is copied and pickled with the model.

    ``print`` it, or take its ``rows``: of each layer its name, class before and after, what it was fused with,
    and a note why it was left. ``replaced``, ``fused`` and ``left`` are some of the rows.

    Raises:
        TypeError: for what is no module.
        ValueError: for a model that is not converted.

    Example:
        >>> import triton_bn
        >>> from torch import nn
        >>> model = triton_bn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
        >>> [(row.name, row.fused) for row in triton_bn.conversion_report(model).fused]
        [('0', 'relu')]
    """
    require_module(model)
    report: Report | None = vars(model).get(_REPORT)
    if report is None:
        raise ValueError(f"this {type(model).__name__} is not converted")
    return report


# --------------------------------------------------------------------------------------- the verbs


def _require_convertible(model: nn.Module) -> None:
    require_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted or traced model cannot be converted: convert it before")
    for name, module in model.named_modules():
        wrapped = type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
        if wrapped or module._compiled_call_impl is not None:
            where = f"its {name!r} is" if name else "it is"
            raise ValueError(f"convert a model before torch.compile: {where} compiled already")


def convert(
    model: Model,
    *,
    fuse: bool = True,
    sync: bool = False,
    process_group: ProcessGroup | None = None,
    recompute: bool = False,
    verbose: bool = False,
) -> Model:
    """Makes every batch normalization of torch.nn in ``model`` ours, in place, and fuses it.

    The layers stay the same objects, with the same parameters, buffers, hooks and flags, and the
    state_dict keeps its keys: optimizers go on, and checkpoints load both ways.
    ``nn.SyncBatchNorm`` stays synchronized, in its group. A lazy layer becomes ours when it is
    materialised. Layers that were built as ours stay (but for ``sync``), and are fused as well.

    With ``fuse``, an add or an activation that follows a layer is computed by the layer's kernels.
    A layer keeps no trace of it: it stays a batch norm, and an activation stays where and what it
    is. The module that calls both, an ``nn.Sequential`` or a block, gets a subclass of its class, of
    the same name, whose forward looks at each call at what is there, and makes one call of the two
    where kernels would compute it. Else the original forward runs. So layers and activations may be
    replaced, removed, swapped, hooked, frozen or pruned afterwards, sequences sliced and extended,
    attributes changed: it is the model's own forward with the same results. A block's forward is
    edited as source, and what cannot be read (a decorated forward, say) is not fused.

    It is asked of a forward that looking at attributes and operators changes nothing, and where
    ``type(module) is nn.Sequential`` or ``nn.BatchNorm2d`` is asked (torch.ao's ``fuse_modules``,
    Opacus' validator, BackPACK), :func:`revert` first. ``fuse_conv_bn_eval`` takes any of these layers
    for a plain batch norm: one that was *built* with an activation loses it there.

    Convert before ``torch.compile``; ``DistributedDataParallel`` may come before or after.

    Args:
        model: any module, a batch normalization layer included.
        fuse: fuse adds and activations.
        sync: make every layer a :class:`triton_bn.SyncBatchNorm`. One that cannot be, since its class
            has a forward of its own, is left, with a warning.
        process_group: that of the layers which ``sync`` synchronizes; ``None``: the default group.
        recompute: make the layers' outputs again in backward instead of keeping them for it: the model's
            forward enters :func:`triton_bn.recompute` itself, until :func:`revert`. So nothing else needs
            to know, neither a training loop nor DistributedDataParallel or FSDP around the model.
        verbose: print the report that :func:`conversion_report` gives.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: for what is no module.
        ValueError: for a scripted or compiled model; with ``recompute`` for one that no subclass can be
            made for. Nothing has been changed then.

    Example:
        >>> import torch, triton_bn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)  # it may be made before or after
        >>> model = triton_bn.convert(model)
        >>> print(triton_bn.conversion_report(model))
        layer  was          is                     fused with  note
        -----  -----------  ---------------------  ----------  ----
        1      BatchNorm2d  triton_bn.BatchNorm2d  relu
        1 layers: 1 replaced, 1 fused, 0 left
        they are fused by: (model)
        >>> model(torch.randn(2, 3, 9, 9)).shape
        torch.Size([2, 8, 7, 7])
    """
    _require_convertible(model)
    with LOCK:
        report, changes, unsynchronized = _planned(model, fuse, sync, process_group)
        if recompute or recomputes(type(model)):
            changes += _recomputing(model, changes)
        apply([*changes, (vars(model), _REPORT, report)])
    if unsynchronized:
        warnings.warn(
            f"not synchronized, since they were left as they are: {', '.join(unsynchronized)} "
            "(triton_bn.conversion_report says why)",
            stacklevel=2,
        )
    for row in report.rows:
        logger.info("%s", row)
    if verbose:
        print(report)
    return model


def _recomputing(model: nn.Module, changes: list[Change]) -> list[Change]:
    """What makes the model's forward enter :func:`triton_bn.recompute`, after the other changes."""
    if isinstance(model, _BatchNorm):
        return []  # nobody takes its output there
    cls: Any = type(model)
    for target, key, new in changes:
        if target is model and key == "__class__":
            cls = new
    if recomputes(cls):
        return []
    try:
        if "forward" in vars(model):
            raise Refused("was replaced on the instance")
        return [(model, "__class__", recomputing(cls))]
    except Refused as refused:
        raise ValueError(
            f"recompute=True needs a subclass of {cls.__name__}, whose forward {refused}: put "
            "`with triton_bn.recompute():` around the call instead"
        ) from refused


def _planned(
    model: nn.Module, fuse: bool, sync: bool, process_group: ProcessGroup | None
) -> tuple[Report, list[Change], list[str]]:
    """The report, what is to be changed, and the layers that stay alone though ``sync`` is asked for."""
    layers = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    replaced = replacements(
        layers,
        TWINS,
        sync=SyncBatchNorm if sync else None,
        process_group=process_group,
        front=FusingBehind if fuse else Behind,
    )
    changes = [change for one in replaced.values() for change in one.changes]
    able: dict[nn.Module, type] = {
        layer: one.after
        for layer, one in replaced.items()
        if issubclass(one.after, OURS)
        and not isinstance(layer, LazyModuleMixin)
        and getattr(layer, "activation", None) is None
    }
    search = Search(model, able) if fuse else None
    fusing: list[nn.Module] = []
    if search is not None:
        more, fusing = search.changes()
        changes += more
    rows = []
    for layer, name in layers.items():
        one = replaced[layer]
        fused = "" if search is None else search.fused(layer)
        note = one.note
        if search is not None and not fused and layer in able:
            note = search.note(layer, model) or note
        rows.append(Row(name, _name(type(layer)), _name(one.after), fused, note))
    alone = [
        row.name or "(model)"
        for row, one in zip(rows, replaced.values(), strict=True)
        if sync and not issubclass(one.after, SyncBatchNorm | nn.SyncBatchNorm)
    ]
    names = [name for name, module in model.named_modules() if module in fusing]
    return Report(tuple(rows), tuple(names)), changes, alone


def _name(cls: type) -> str:
    ours = next((base for base in cls.__mro__ if base in STOCK), None)
    return cls.__name__ if ours is None else f"triton_bn.{ours.__name__}"


def revert(model: Model) -> Model:
    """Makes every layer of ours in ``model`` torch.nn's again, in place, and undoes what was fused.

    Layers that were built as ours become their twins, too. Parameters, buffers, hooks and the
    state_dict's keys stay.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: for what is no module.
        ValueError: for a layer that was built with an activation, which torch.nn has no layer for.
            Nothing has been changed then.

    Example:
        >>> import triton_bn
        >>> from torch import nn
        >>> triton_bn.revert(triton_bn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())))
        Sequential(
          (0): BatchNorm1d(3, eps=1e-05, ...)
          (1): ReLU()
        )
    """
    require_module(model)
    with LOCK:
        changes: list[Change] = []
        for name, module in model.named_modules():
            own, cls = vars(module), type(module)
            changes += [(own, key, ABSENT) for key in (_REPORT, FROM) if key in own]
            if isinstance(module, OURS) or FROM in own:
                changes += _reverted(name, module)
            elif (without := underneath(thawed(cls))) is not thawed(cls):
                changes.append((module, "__class__", without))
        apply(changes)
    logger.info("reverted a %s: %d changes", type(model).__name__, len(changes))
    return model


def _reverted(name: str, layer: nn.Module) -> list[Change]:
    """What makes one layer torch.nn's again."""
    own, cls = vars(layer), thawed(type(layer))
    parametrized = parametrize.is_parametrized(layer)
    stock = own.get(FROM) or STOCK.get(cls.__bases__[0] if parametrized else cls)
    if stock is None or getattr(layer, "activation", None) is not None:
        raise ValueError(
            f"torch.nn has no layer for {name or 'the model'!r}, which was built as {layer}"
        )
    foreign = ["activation", "cls_to_become", "_agreed"]
    if not issubclass(stock, nn.SyncBatchNorm):
        foreign.append("process_group")
    changes: list[Change] = [(own, key, ABSENT) for key in foreign if key in own]
    if not isinstance(layer, LazyModuleMixin):
        cls = rebased(cls, stock) if parametrized else stock
        if isinstance(layer, Frozen):  # it stays so
            cls = frozen(cls, parametrized)
        changes.append((layer, "__class__", cls))
    return changes
