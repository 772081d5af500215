"""Fusing, decided at the call: what a forward does that calls a layer and what stands behind it.

A layer, an activation or a sequence is called through :func:`call`. Where the callee is a layer of
ours and kernels would compute it, the call is only noted: :class:`Pending`. An add and an
activation that come next are noted with it, and make one fused call. Whatever else comes first
makes the call as it would have been made, so nothing ever runs in another order than in the
original forward. All that decides is read at the call: which modules are there, what they are,
who looks at them, which options they have.

A pending call never leaves the forward that made it, but to a forward that called through
:func:`call` itself (a block that a sequence ends with, say).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from triton_bn.conversion.derive import derived, original, recipe
from triton_bn.conversion.replace import Behind
from triton_bn.modules import _Fused
from triton_bn.problem import Activation
from triton_bn.recompute import recompute, recording
from triton_bn.route import route

__all__ = [
    "METHODS", "MODULES", "FusingBehind", "Pending", "activation_of", "add", "add_in_place", "after", "call",
    "chained", "fusing", "is_activation", "is_identity", "method", "opens", "passes", "recomputes", "recomputing",
    "unhooked", "value",
]  # fmt: skip


# ------------------------------------------------------------------------------ what is asked


def computes(layer: _Fused) -> bool:
    """Whether kernels or operators of ours compute a layer's call where they :func:`could_compute`.

    In a graph of torch.compile PyTorch's own are folded where running statistics are used.
    """
    # In the order of what is asked for the least: this stands before every fused call.
    return layer.training or not torch.compiler.is_compiling() or layer.running_mean is None


def could_compute(*arguments: Any) -> bool:
    """Whether kernels or operators of ours may compute anything in a forward that is given these.

    Inside :func:`triton_bn.recompute` PyTorch's own are called through the layer as well: one call says
    how all of the output is made again.
    """
    for argument in arguments:
        if type(argument) is not Tensor and isinstance(argument, (list, tuple)) and argument:
            argument = argument[0]
        if isinstance(argument, Tensor):
            return route(argument, batch_statistics=True) != "torch" or recording() is not None
        if isinstance(argument, Proxy):
            return False
    return True


def unhooked(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward, and nobody looks at it."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or module._compiled_call_impl is not None
        or type(module).__call__ is not nn.Module.__call__
    )


def opens(cls: type) -> Any:
    """Of a class whose forward calls by :func:`call`: the one that may leave a call pending."""
    return getattr(getattr(cls, "forward", None), "pending", None)


def passes(module: Any) -> bool:
    """Whether its forward returns what it is given: ``nn.Identity``, or an empty ``nn.Sequential``."""
    return type(module) is nn.Identity or (type(module) is nn.Sequential and not module._modules)


def is_identity(module: Any) -> bool:
    return passes(module) and unhooked(module)


# --------------------------------------------------------------------------- the activations

#: What each takes beside its input, by the names that torch.nn and torch.nn.functional give it.
#: What an activation takes and this table does not name is never ignored: it is not fused.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "relu": ("inplace",),
    "relu6": ("inplace",),
    "hardtanh": ("min_val", "max_val", "inplace"),
    "leaky_relu": ("negative_slope", "inplace"),
    "silu": ("inplace",),
    "hardswish": ("inplace",),
    "gelu": ("approximate",),
    "elu": ("alpha", "inplace"),
    "mish": ("inplace",),
    "sigmoid": (),
    "tanh": (),
}
_MODULES: dict[type, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.GELU: "gelu", nn.ELU: "elu", nn.Mish: "mish",
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip
_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in set(_MODULES.values())},
    **{getattr(F, f"{name}_"): name for name in ("relu", "elu", "leaky_relu", "hardtanh")},
    **{getattr(torch, name): name for name in ("relu", "sigmoid", "tanh")},
    **{getattr(torch, f"{name}_"): name for name in ("relu", "sigmoid", "tanh")},
}
#: Those of a tensor.
METHODS: dict[str, str] = {
    f"{name}{tail}": name for name in ("relu", "sigmoid", "tanh") for tail in ("", "_")
}
#: What torch.nn.Hardtanh's constructor also takes: two old names of its bounds.
_OLD_NAMES = {"min_value", "max_value"}
_PLAIN = {
    name: Activation(name)
    for name in ("relu", "relu6", "silu", "hardswish", "gelu", "mish", "sigmoid", "tanh")
}


def _activation(name: str, options: dict[str, Any]) -> Activation | None:
    """What a function of torch.nn.functional with these arguments is, if it is one of ours."""
    if name == "hardtanh":
        bounds = options.get("min_val", -1.0), options.get("max_val", 1.0)
        return _PLAIN["relu6"] if bounds == (0.0, 6.0) else None
    if name == "gelu":
        return _PLAIN[name] if options.get("approximate", "none") == "none" else None
    if name in _PLAIN:
        return _PLAIN[name] if options.keys() <= {"inplace"} else None
    parameter = options.get("negative_slope" if name == "leaky_relu" else "alpha")
    return Activation(name, parameter) if isinstance(parameter, float | int | None) else None


def named(modules: dict[type, str]) -> dict[type, str]:
    """Those of them all of whose options the table names."""

    def options(cls: type) -> set[str]:
        initialize: Any = cls.__init__  # type: ignore[misc]
        none = initialize is nn.Module.__init__
        return set() if none else set(inspect.signature(cls).parameters) - _OLD_NAMES

    return {cls: name for cls, name in modules.items() if options(cls) <= {*_OPTIONS[name]}}


MODULES = named(_MODULES)


def is_activation(function: Any) -> bool:
    """Whether it may be one that we have, with some options."""
    plain = isinstance(function, types.FunctionType | types.BuiltinFunctionType)
    return plain and function in _FUNCTIONS


def activation_of(
    callee: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
) -> Activation | None:
    """What a callee is that is given a tensor and these, if it is an activation that we have."""
    if isinstance(callee, nn.Module):
        name = MODULES.get(type(callee))
        if name is None or arguments or options or not unhooked(callee):
            return None
        if _OPTIONS[name] in ((), ("inplace",)):
            return _PLAIN[name]
        return _activation(name, {option: getattr(callee, option) for option in _OPTIONS[name]})
    if not isinstance(callee, types.FunctionType | types.BuiltinFunctionType):
        return None
    name = _FUNCTIONS.get(callee)
    if name is None:
        return None
    names, options = _OPTIONS[name], options or {}
    if len(arguments) > len(names) or not options.keys() <= set(names):
        return None
    return _activation(name, {**dict(zip(names, arguments, strict=False)), **options})


# -------------------------------------------------------------------------------- the calls


class Pending:
    """``layer(input)``, or ``layer(input) + residual``, not computed yet; or what came of it."""

    __slots__ = ("input", "layer", "residual", "value")

    def __init__(self, layer: _Fused, input: Tensor, residual: Tensor | None = None) -> None:
        self.layer, self.residual = layer, residual
        #: ``None`` from the moment on when it is computed, or is part of a sum that will be.
        self.input: Tensor | None = input

    def compute(self, activation: Activation | None = None) -> Any:
        input, residual = self.input, self.residual
        self.input = self.residual = None
        self.value: Any = self.layer._fused(input, residual, activation)  # type: ignore[arg-type]
        return self.value


def value(x: Any) -> Any:
    """What a call has returned, made now if it is pending."""
    if type(x) is not Pending:
        return x
    return x.value if x.input is None else x.compute()


def after(callee: Any, *pending: Any) -> Any:
    """``callee``, which may be called when these calls have been made."""
    if not is_identity(callee):
        for one in pending:
            value(one)
    return callee


def call(callee: Any, x: Any, /, *arguments: Any, **options: Any) -> Any:
    """``callee(x, ...)``, or a :class:`Pending` that stands for it."""
    if type(x) is Pending:
        if x.input is not None:
            activation = activation_of(callee, arguments, options)
            if activation is not None:
                return x.compute(activation)
            if is_identity(callee) and not arguments and not options:
                return x
        x = value(x)
    if isinstance(callee, nn.Module):
        forward = getattr(type(callee), "forward", None)
        if forward is _Fused.forward:
            layer: Any = callee
            alone = layer.activation is None and not arguments and not options
            if alone and type(x) is Tensor and unhooked(layer) and computes(layer):
                return Pending(layer, x)
        elif (pending := getattr(forward, "pending", None)) is not None and unhooked(callee):
            return pending(callee, x, *arguments, **options)
    return callee(x, *arguments, **options)


def method(x: Any, name: str) -> Any:
    """``x.relu()`` and the like."""
    if type(x) is Pending and x.input is not None:
        return x.compute(_PLAIN[METHODS[name]])
    return getattr(value(x), name)()


def _takes(x: Pending, residual: Any) -> bool:
    """Whether the layer adds it as PyTorch's ``+`` would: what broadcasts or promotes is left to that."""
    return (
        x.input is not None
        and x.residual is None
        and isinstance(residual, Tensor)
        and residual.shape == x.input.shape
        and residual.dtype == x.input.dtype
        and residual.device == x.input.device
        and type(residual) in (Tensor, nn.Parameter)
    )


def _added(x: Pending, residual: Tensor) -> Pending:
    input, x.input = x.input, None  # it is the sum that is to be computed now
    return Pending(x.layer, input, residual)  # type: ignore[arg-type]


def add(a: Any, b: Any) -> Any:
    """``a + b``. At most one of them has not been computed."""
    if a is b:
        a = b = value(a)
    elif type(a) is Pending and a.input is not None:
        b = value(b)
        if _takes(a, b):
            return _added(a, b)
    elif type(b) is Pending and b.input is not None:
        a = value(a)
        if _takes(b, a):
            return _added(b, a)
    return value(a) + value(b)


def add_in_place(a: Any, b: Any) -> Any:
    """``a += b``, where a :class:`Pending` ``a`` is a result that nobody else has seen."""
    if type(a) is Pending:
        if a.input is not None:
            b = value(b)
            if _takes(a, b):
                return _added(a, b)
        elif type(b) is Pending and _takes(b, a.value):
            return _added(b, a.value)
        a = value(a)
    a += value(b)
    return a


# ------------------------------------------------------------------------------ the forwards


def fusing(cls: type, name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """A method for a subclass of ``cls``: ``body``, which calls by :func:`call`, or the original.

    The original runs wherever kernels would compute nothing anyway: on a CPU, in an export, a
    trace or a graph of torch.fx; and where somebody has put another in its place since.
    """
    original = getattr(cls, name)

    def pending(self: Any, /, *arguments: Any, **options: Any) -> Any:
        """For a caller that has asked already."""
        plain = getattr(cls, name)
        return (body if plain is original else plain)(self, *arguments, **options)

    @functools.wraps(original)
    def method(self: Any, /, *arguments: Any, **options: Any) -> Any:
        if could_compute(*arguments, *options.values()) and not _has_any_global_hook():
            return value(pending(self, *arguments, **options))
        return getattr(cls, name)(self, *arguments, **options)

    method.pending = pending  # type: ignore[attr-defined]
    return method


def _in_turn(self: nn.Sequential, input: Any) -> Any:
    for module in self._modules.values():
        input = call(module, input)
    return input


@functools.cache
def chained(cls: type) -> type:
    """A subclass of an ``nn.Sequential``'s class."""
    return derived((cls,), {"forward": fusing(cls, "forward", _in_turn)}, (chained, cls))


@functools.cache
def recomputing(cls: type) -> type:
    """A subclass of a model's class whose forward is inside :func:`triton_bn.recompute`."""
    start: Any = cls

    @functools.wraps(start.forward)
    def forward(self: Any, /, *arguments: Any, **options: Any) -> Any:
        with recompute():
            return start.forward(self, *arguments, **options)

    vars(forward).pop("pending", None)  # what is left pending would be called outside
    forward.recomputes = True  # type: ignore[attr-defined]
    return derived((cls,), {"forward": forward}, (_recomputing, original(cls), recipe(cls)))


def _recomputing(cls: type, inner: tuple[Any, ...] | None) -> type:
    return recomputing(cls if inner is None else inner[0](*inner[1:]))


def recomputes(cls: type) -> bool:
    return getattr(getattr(cls, "forward", None), "recomputes", False)


class FusingBehind(Behind):
    """The same, in one call."""

    def forward(self, input: Tensor) -> Tensor:
        if could_compute(input) and not _has_any_global_hook():
            return value(_behind(self, input))
        return super().forward(input)


def _behind(self: Any, input: Tensor) -> Any:
    if type(input) is Tensor and computes(self):
        return call(self.act, call(self.drop, Pending(self, input)))
    return Behind.forward(self, input)


FusingBehind.forward.pending = _behind  # type: ignore[attr-defined]
