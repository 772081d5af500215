"""Layers of torch.nn become ours and back, each the same object with another class; all or none.

Nothing of a layer can get lost so: parameters, buffers, hooks and flags are what they were, a
pruned, shared, lazy or parametrized layer stays one, and whoever holds it holds the new one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from triton_bn.conversion.derive import Refused, merged, underneath

__all__ = [
    "ABSENT",
    "FROM",
    "LOCK",
    "Behind",
    "Change",
    "Frozen",
    "Replacement",
    "apply",
    "frozen",
    "recorded",
    "replacements",
    "thawed",
]

#: A module and ``"__class__"``, or a dictionary and a key; and the new value.
Change = tuple[Any, str, Any]
ABSENT = object()

#: On a converted layer: the class to go back to.
FROM = "_converted_from"

#: Held while a model is planned and changed: two threads may hand over models that share modules.
LOCK = threading.RLock()

#: Subclasses of torch.nn's layers that end with ``self.act(self.drop(...))``.
_WITH_ACTIVATION = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
}
#: What a subclass of a layer may not override, to be that layer.
_DEFINING = ("forward", "_check_input_dim", "__call__")


class Behind(nn.Module):
    """Front of timm's layers: what stands behind their normalization stays modules of its own."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        given: Any = input
        if isinstance(given, Proxy):  # all of it is one call
            return recorded(self, given)
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def recorded(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    """A call under torch.fx: as one of PyTorch's own layers, which it does not look into."""
    tracer: Any = inputs[0].tracer
    given = tuple(one for one in inputs if one is not None)
    named = {name: one for name, one in options.items() if one is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), given, named)


class Frozen:
    """Front of frozen layers: in evaluation, whatever ``train()`` says.

    Whoever computes asks ``training``: torch.nn's layers, ours, timm's. What was said is kept, for when
    the front goes.
    """

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        vars(self)["training"] = mode

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        return f"{text}, frozen"


def frozen(cls: type, parametrized: bool) -> type:
    """The class of a layer as it is when frozen; for a ``parametrized`` one, below what parametrizes it.

    Raises:
        Refused: where the class cannot be subclassed.
    """
    if issubclass(cls, Frozen):
        return cls
    base: Any = cls.__bases__[0] if parametrized else cls
    front = merged(base, Frozen)
    return rebased(cls, front) if parametrized else front


def thawed(cls: type) -> type:
    """The class of a layer as it is when not frozen."""
    return underneath(cls, Frozen)


@dataclass
class Replacement:
    """What is to become of one layer."""

    #: The class that it is to have, that it has now where nothing is changed.
    after: type
    note: str = ""
    changes: list[Change] = field(default_factory=list)


def replacements(
    layers: Iterable[_BatchNorm],
    twins: Mapping[type, type],
    *,
    sync: type | None = None,
    process_group: Any = None,
    regroup: bool = False,
    front: type[Behind] = Behind,
) -> dict[_BatchNorm, Replacement]:
    """What makes each layer the twin of its class, or ``sync``.

    Args:
        twins: torch.nn's classes, and ours for each.
        sync: the class of synchronized layers, where all are to be synchronized.
        process_group: that of the layers which become synchronized.
        regroup: of those that are so already, too.
        front: what goes before the class of timm's layers.
    """
    found: dict[_BatchNorm, Replacement] = {}
    ours = tuple(twins.values())
    for layer in layers:
        found[layer] = one = Replacement(type(layer))
        was_sync = isinstance(layer, nn.SyncBatchNorm) or (
            sync is not None and isinstance(layer, sync)
        )
        already = isinstance(layer, ours)
        if already or FROM in vars(layer):
            one.note = "ours already" if already else "becomes ours when it is materialised"
        if already and (sync is None or was_sync):
            if sync is not None and regroup:
                one.changes.append((vars(layer), "process_group", process_group))
            continue
        if FROM in vars(layer) and sync is None:
            continue
        try:
            cls, stock = _classes(layer, twins, sync, front)
        except Refused as refused:
            one.note = str(refused)
            continue
        if isinstance(layer, Frozen):  # it stays so
            cls = frozen(cls, parametrize.is_parametrized(layer))
        lazy = isinstance(layer, LazyModuleMixin)
        one.after = cls
        one.changes.append(
            (vars(layer), "cls_to_become", cls) if lazy else (layer, "__class__", cls)
        )
        if not already:
            one.changes.append((vars(layer), FROM, stock))
        if sync is not None and (regroup or not was_sync):
            one.changes.append((vars(layer), "process_group", process_group))
        if lazy:  # the first call still runs the lazy class's forward
            one.note = "becomes ours when it is materialised: convert again to fuse it"
    return found


def _classes(
    layer: _BatchNorm, twins: Mapping[type, type], sync: type | None, front: type
) -> tuple[type, type]:
    """The class that ``layer`` is to have, and the one to go back to.

    Raises:
        Refused: with the reason for leaving it.
    """
    cls: Any = thawed(type(layer))
    parametrized = parametrize.is_parametrized(layer)
    if isinstance(layer, LazyModuleMixin):
        cls = cls.cls_to_become
    elif parametrized:
        cls = cls.__bases__[0]
    cls = vars(layer).get(FROM, cls)
    known = {**twins, **{ours: ours for ours in twins.values()}}
    stock = next((base for base in cls.__mro__ if base in known), None)
    if stock is None:
        raise Refused(f"a {cls.__name__} is none of torch.nn's layers that have a twin")
    if "forward" in vars(layer):
        raise Refused("its forward was replaced on the instance")
    twin = known[stock] if sync is None else sync
    if cls is stock:
        return (rebased(thawed(type(layer)), twin) if parametrized else twin), cls
    if parametrized:
        raise Refused(f"a {cls.__name__} that is parametrized")
    if f"{cls.__module__}.{cls.__qualname__}" in _WITH_ACTIVATION:
        return merged(cls, front, twin), cls
    if any(getattr(cls, name) is not getattr(stock, name) for name in _DEFINING):
        raise Refused(f"a {cls.__name__} has a forward of its own")
    return merged(cls, twin), cls


def rebased(cls: type, base: type) -> type:
    """A parametrized layer's class (torch.nn's, and properties) on another base."""
    return type(cls.__name__, (base,), dict(vars(cls)))


def _get(target: nn.Module | MutableMapping[str, Any], key: str) -> Any:
    return type(target) if isinstance(target, nn.Module) else target.get(key, ABSENT)


def _set(target: nn.Module | MutableMapping[str, Any], key: str, value: Any) -> None:
    if isinstance(target, nn.Module):  # past any __setattr__ of its own
        object.__setattr__(target, key, value)
    elif value is ABSENT:
        target.pop(key, None)
    else:
        target[key] = value


def apply(changes: list[Change]) -> None:
    """Makes all changes; takes them back where one fails."""
    done: list[Change] = []
    try:
        for target, key, value in changes:
            done.append((target, key, _get(target, key)))
            _set(target, key, value)
    except BaseException:
        for target, key, value in reversed(done):
            _set(target, key, value)
        raise
