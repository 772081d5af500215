"""The registered operators ``torch.ops.triton_bn.{forward, normalize, backward}``, and the call of them.

Whatever watches operators go by (torch.compile, fake tensors, dispatch modes) is given these; they end in
the verbs that eager calls go straight to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from triton_bn import verbs
from triton_bn.autograd import BatchNorm, Call, Operators, flat, keeps_bits
from triton_bn.problem import Activation
from triton_bn.sync import Ranks
from triton_bn.verbs import absent, fake_outputs

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: Activation | None,
    ranks: Ranks | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`triton_bn.autograd.batch_norm` by the registered operators."""
    bits = keeps_bits(x, weight, bias, residual, training, activation)
    if ranks is not None:
        ranks.sent = True  # or will be: the operator has ranks of its own
    if training:
        return torch.ops.triton_bn.forward(
            x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
            momentum, eps, *flat(activation), bits, *_named(ranks), mask,
        )[0]  # fmt: skip
    return torch.ops.triton_bn.normalize(
        x, running_mean, running_var, weight, bias, residual, eps, *flat(activation), bits, mask
    )[0]


def _named(ranks: Ranks | None) -> tuple[str | None, bool]:
    return (None, False) if ranks is None else (ranks.group.group_name, ranks.ask)


# The operators. Activations travel as (name, parameter), ranks as (name of the group, whether it is still
# to be asked); absent outputs as empty tensors.

_library = torch.library.Library("triton_bn", "DEF")
_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, str? activation, "
    "float? parameter, bool bits, str? group, bool ask, Tensor? mask) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "normalize(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? residual, "
    "float eps, str? activation, float? parameter, bool bits, Tensor? mask) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? packed, str? activation, float? parameter, bool training, bool[4] needs, str? group, "
    "Tensor? mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _activation(name: str | None, parameter: float | None) -> Activation | None:
    return None if name is None else Activation(name, parameter)


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors: list[Any]
    *tensors, name, parameter, bits, group, ask, mask = arguments
    ranks = None if group is None else Ranks.named(group, tensors[0], ask)
    others = (_activation(name, parameter), bits, ranks, mask)
    with nullcontext() if ranks is None else ranks.together():
        y, stats, packed = verbs.forward(*(*tensors, *others))
    return y, stats, absent(y, torch.uint8) if packed is None else packed


def _normalize_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, name, parameter, bits, mask = arguments
    others = (_activation(name, parameter), bits, mask)
    y, stats, packed = verbs.normalize(*(*tensors, *others))
    return y, stats, absent(y, torch.uint8) if packed is None else packed


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    dy, *_, name, parameter, training, needs, group, mask = arguments
    ranks = None if group is None else Ranks.named(group, dy, False)
    others = (_activation(name, parameter), training, tuple(needs), ranks, mask)
    gradients = verbs.backward(*(*arguments[:-6], *others))
    # An operator's outputs are its own: without an activation dresidual is dy itself.
    return tuple(absent(dy) if g is None else g.clone() if g is dy else g for g in gradients)


def _autograd_op(op: str, split: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """The operator with its gradient; ``split`` makes its arguments those of BatchNorm: tensors, and a Call's."""

    def call(keyset: Any, *arguments: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            given, options = split(*arguments)
            return BatchNorm.apply(Call(Operators(below), *options), *given)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.triton_bn, op).default.redispatch(below, *arguments)

    return call


def _split_forward(*arguments: Any) -> tuple[Any, ...]:
    (
        x, weight, bias, mean, var, tracked, residual, momentum, eps, name, parameter, bits,
        group, ask, mask,
    ) = arguments  # fmt: skip
    ranks = None if group is None else (group, ask)
    options = True, momentum, eps, _activation(name, parameter), bits, ranks
    return (x, weight, bias, residual, mean, var, tracked, mask), options


def _split_normalize(*arguments: Any) -> tuple[Any, ...]:
    x, mean, var, weight, bias, residual, eps, name, parameter, bits, mask = arguments
    options = False, 0.0, eps, _activation(name, parameter), bits
    return (x, weight, bias, residual, mean, var, None, mask), options


for _name, _implementation, _split in (
    ("forward", _forward_op, _split_forward),
    ("normalize", _normalize_op, _split_normalize),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd_op(_name, _split), "Autograd", with_keyset=True)
_library.impl("backward", _backward_op, "CompositeExplicitAutograd")


@torch.library.register_fake("triton_bn::forward", lib=_library)
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, bits, group, _, mask = others
    return fake_outputs(x, bits, 2 if group is None and mask is None else 3)


@torch.library.register_fake("triton_bn::normalize", lib=_library)
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_outputs(x, others[-2])


@torch.library.register_fake("triton_bn::backward", lib=_library)
def _(
    dy: Tensor,
    x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *others: Any,
) -> Any:
    like = dy if x is None else x
    wanted = (like, weight, next(t for t in (bias, weight, stats[1]) if t is not None), like)
    return tuple(
        torch.empty_like(t) if needed and t is not None else absent(dy)
        for t, needed in zip(wanted, others[-3], strict=True)
    )
