"""``convert`` a whole model: stock batch normalization becomes ours, and takes up what follows it.

A layer is converted by giving the very object another class, as PyTorch does when a lazy layer is
materialised. So nothing of it can get lost: parameters, buffers and hooks are what they were, and
whoever holds the layer (an optimizer, a Python list, another model) holds the converted one.

Everything is planned before anything is changed, and undone if a change fails half-way.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from triton_bn import modules
from triton_bn.conversion import fuse as fusion
from triton_bn.conversion import rewrite
from triton_bn.conversion.fuse import Change, Folded
from triton_bn.conversion.rewrite import Refused
from triton_bn.problem import Activation, require_module

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

__all__ = ["Report", "Row", "conversion_report", "convert", "revert"]

Model = TypeVar("Model", bound=nn.Module)

#: The layers of torch.nn, and ours.
TWINS: dict[type, Any] = {
    getattr(nn, name): getattr(modules, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
}
STOCK = {ours: stock for stock, ours in TWINS.items()}
OURS = tuple(STOCK)

#: On a converted layer: the class to go back to. On a converted model: its report.
_FROM, _REPORT = "_converted_from", "_conversion_report"

#: Subclasses of torch.nn's layers that end with ``self.act(self.drop(...))``.
_WITH_ACTIVATION = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
}


# ------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """What became of one batch normalization layer."""

    name: str
    #: Its class before and after.
    before: str
    after: str
    #: What it took up: ``"relu"``, ``"add"``, ``"add + relu"``, ...; or nothing: ``""``.
    fused: str = ""
    #: Why it took up nothing, or was left.
    note: str = ""

    def __str__(self) -> str:
        did = f"{self.before} becomes {self.after}" if self.before != self.after else "left"
        fused = self.fused and f", fused with {self.fused}"
        return f"{self.name or '(model)'}: {did}{fused}{self.note and f': {self.note}'}"


@dataclass(frozen=True)
class Report:
    """What :func:`convert` did; printed, a table."""

    rows: tuple[Row, ...]
    #: The modules whose forward was rewritten.
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
            lines.append(f"forward rewritten: {', '.join(names)}")
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


# ----------------------------------------------------------------------------- changes, all or none

_ABSENT = object()


def _get(target: nn.Module | MutableMapping[str, Any], key: str) -> Any:
    return type(target) if isinstance(target, nn.Module) else target.get(key, _ABSENT)


def _set(target: nn.Module | MutableMapping[str, Any], key: str, value: Any) -> None:
    if isinstance(target, nn.Module):  # past any __setattr__ of its own
        object.__setattr__(target, key, value)
    elif value is _ABSENT:
        target.pop(key, None)
    else:
        target[key] = value


def _apply(changes: list[Change]) -> None:
    done: list[Change] = []
    try:
        for target, key, value in changes:
            done.append((target, key, _get(target, key)))
            _set(target, key, value)
    except BaseException:
        for target, key, value in reversed(done):
            _set(target, key, value)
        raise


# -------------------------------------------------------------------------------- which class, why


class _ActivationBehind(nn.Module):
    """timm's layers, where their activation stays a module of its own."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


#: What a subclass of a layer may not override, to be that layer.
_DEFINING = ("forward", "_check_input_dim", "__call__")


def _replacement(layer: _BatchNorm, sync: bool, takes_own: bool) -> tuple[type, type]:
    """The class that ``layer`` is to have, and the one to go back to.

    ``takes_own``: what timm's layers have behind the normalization is taken up.

    Raises:
        Refused: with the reason for leaving it.
    """
    cls: Any = type(layer)
    parametrized = parametrize.is_parametrized(layer)
    if isinstance(layer, LazyModuleMixin):
        cls = cls.cls_to_become
    elif parametrized:
        cls = cls.__bases__[0]
    stock = next((base for base in cls.__mro__ if base in TWINS), None)
    if stock is None:
        raise Refused(f"a {cls.__name__} is none of torch.nn's layers that have a twin")
    if "forward" in vars(layer):
        raise Refused("its forward was replaced on the instance")
    twin = TWINS[nn.SyncBatchNorm if sync else stock]
    if cls is stock:
        return (_rebased(type(layer), twin) if parametrized else twin), cls
    if parametrized:
        raise Refused(f"a {cls.__name__} that is parametrized")
    if fusion.qualified(cls) in _WITH_ACTIVATION:
        return rewrite.merged(cls, *([twin] if takes_own else [_ActivationBehind, twin])), cls
    if any(getattr(cls, name) is not getattr(stock, name) for name in _DEFINING):
        raise Refused(f"a {cls.__name__} has a forward of its own")
    return rewrite.merged(cls, twin), cls


def _rebased(cls: type, base: type) -> type:
    """A parametrized layer's class (torch.nn's, and properties) on another base."""
    return type(cls.__name__, (base,), dict(vars(cls)))


def _own_activation(layer: nn.Module) -> tuple[bool, Activation | None]:
    """What timm's layers have behind the normalization: whether it can be taken up; what it is."""
    drop, act = getattr(layer, "drop", None), getattr(layer, "act", None)
    if fusion.qualified(type(layer)) not in _WITH_ACTIVATION or act is None:
        return False, None
    if type(drop) is not nn.Identity or fusion.hooked(drop):
        return False, None
    if type(act) is nn.Identity and not fusion.hooked(act):
        return True, None
    activation = fusion.module_activation(act)
    return activation is not None, activation


def _require_convertible(model: nn.Module) -> None:
    require_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted or traced model cannot be converted: convert it before")
    for name, module in model.named_modules():
        wrapped = type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")
        if wrapped or module._compiled_call_impl is not None:
            where = f"its {name!r} is" if name else "it is"
            raise ValueError(f"convert a model before torch.compile: {where} compiled already")


# --------------------------------------------------------------------------------------- the verbs


def convert(
    model: Model,
    *,
    fuse: bool = True,
    sync: bool = False,
    process_group: ProcessGroup | None = None,
    verbose: bool = False,
) -> Model:
    """Makes every batch normalization of torch.nn in ``model`` ours, in place, and fuses it.

    The layers stay the same objects, with the same parameters, buffers, hooks and flags, and the
    state_dict keeps its keys: optimizers go on, and checkpoints load both ways.
    ``nn.SyncBatchNorm`` stays synchronized, in its group. A lazy layer becomes ours when it is
    materialised. Layers that were built as ours are left as they are (but for ``sync``).

    With ``fuse``, an add or an activation that follows a layer is computed by the layer where that
    is the same for every input: nothing else takes the values in between, no hook looks at them,
    and the ``forward`` that calls them is straight-line code, or of a class whose code is known.
    A module whose ``forward`` has to be rewritten for that gets a subclass of its class, of the
    same name. What decides a branch in it (a flag, a child that is there or not) is fixed then:
    :func:`revert` before changing it. A hook put on a fused layer later sees what the layer now
    returns; one put on an activation that was taken up may not be called.

    Convert before ``torch.compile``; ``DistributedDataParallel`` may come before or after.

    Args:
        model: any module, a batch normalization layer included.
        fuse: take up adds and activations.
        sync: make every layer a :class:`triton_bn.SyncBatchNorm`.
        process_group: that of the layers which ``sync`` synchronizes; ``None``: the default group.
        verbose: print the report that :func:`conversion_report` gives.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: for what is no module.
        ValueError: for a scripted or compiled model. Nothing has been changed then.

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
        >>> model(torch.randn(2, 3, 9, 9)).shape
        torch.Size([2, 8, 7, 7])
    """
    _require_convertible(model)
    layers = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    changes: list[Change] = []
    after: dict[nn.Module, type] = {}
    fused: dict[nn.Module, str] = {}
    notes: dict[nn.Module, str] = {}
    free: set[nn.Module] = set()
    for layer in layers:
        if isinstance(layer, OURS):
            notes[layer] = "ours already"
            if sync and type(layer) is not modules.SyncBatchNorm and type(layer) in STOCK:
                after[layer] = modules.SyncBatchNorm
                changes.append((layer, "__class__", modules.SyncBatchNorm))
                changes.append((vars(layer), "process_group", process_group))
            if _FROM in vars(layer) and layer.activation is None:
                free.add(layer)
            continue
        if _FROM in vars(layer):
            notes[layer] = "becomes ours when it is materialised"
            continue
        takes_own, activation = _own_activation(layer) if fuse else (False, None)
        try:
            cls, stock = _replacement(layer, sync, takes_own)
        except Refused as refused:
            notes[layer] = str(refused)
            continue
        after[layer] = cls
        changes.append((vars(layer), _FROM, stock))
        if issubclass(cls, modules.SyncBatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            changes.append((vars(layer), "process_group", process_group))
        if isinstance(layer, LazyModuleMixin):
            # The first call still runs the lazy class's forward, so nothing is taken up yet.
            changes.append((vars(layer), "cls_to_become", cls))
            notes[layer] = "becomes ours when it is materialised: convert again to fuse it"
            continue
        changes.append((layer, "__class__", cls))
        if activation is not None:
            fused[layer] = str(activation)
            changes.append((vars(layer), "activation", activation))
            changes.append((layer._modules, "act", Folded(layer.get_submodule("act"))))
        elif issubclass(cls, _ActivationBehind):
            notes[layer] = "what it has behind the normalization cannot be taken up" if fuse else ""
        else:
            free.add(layer)
    rewritten: list[nn.Module] = []
    if fuse and free:
        search = fusion.Search(model, free)
        more, rewritten = fusion.changes(search)
        changes += more
        fused.update((layer, str(fold)) for layer, fold in search.folds.items())
        notes.update((layer, "" if layer in fused else search.note(layer)) for layer in free)
    rows = (
        Row(
            name,
            _name(type(layer)),
            _name(after.get(layer, type(layer))),
            fused.get(layer, ""),
            notes.get(layer, ""),
        )
        for layer, name in layers.items()
    )
    names = {module: name for name, module in model.named_modules()}
    report = Report(tuple(rows), tuple(names[module] for module in rewritten))
    _apply([*changes, (vars(model), _REPORT, report)])
    for row in report.rows:
        logger.info("%s", row)
    if verbose:
        print(report)
    return model


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
    changes: list[Change] = []
    for name, module in model.named_modules():
        own = vars(module)
        changes += [(own, key, _ABSENT) for key in (_REPORT, _FROM) if key in own]
        for key, child in module._modules.items():
            if isinstance(child, Folded):
                activation = vars(child)["activation"]
                changes.append((vars(activation), "training", child.training))
                changes.append((module._modules, key, activation))
        if isinstance(module, OURS) or _FROM in own:
            changes += _reverted(name, module)
        elif rewrite.is_derived(type(module)):
            changes.append((module, "__class__", rewrite.original(type(module))))
    _apply(changes)
    logger.info("reverted a %s: %d changes", type(model).__name__, len(changes))
    return model


def _reverted(name: str, layer: nn.Module) -> list[Change]:
    """What makes one layer torch.nn's again."""
    own, cls = vars(layer), type(layer)
    parametrized = parametrize.is_parametrized(layer)
    stock = own.get(_FROM) or STOCK.get(cls.__bases__[0] if parametrized else cls)
    if stock is None or (_FROM not in own and layer.activation is not None):
        raise ValueError(
            f"torch.nn has no layer for {name or 'the model'!r}, which was built as {layer}"
        )
    foreign = ["activation", "cls_to_become", "_agreed"]
    if not issubclass(stock, nn.SyncBatchNorm):
        foreign.append("process_group")
    changes: list[Change] = [(own, key, _ABSENT) for key in foreign if key in own]
    if not isinstance(layer, LazyModuleMixin):
        changes.append((layer, "__class__", _rebased(cls, stock) if parametrized else stock))
    return changes
