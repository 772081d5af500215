"""Where a call goes (kernels or plain torch), what its derivatives are, and its torch.library operators.

In eager mode the layers' calls go straight to :class:`_BatchNorm`. Whatever watches operators go by
(torch.compile, torch.export, fake tensors, dispatch modes, tensor subclasses) is given those registered
here: ``torch.ops.triton_bn.{forward, normalize, backward}``, which end in the same functions.
Transforms that no operator of ours has rules for (torch.func, forward-mode AD) get
:func:`triton_bn.reference.composite`, PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_bn import launch, reference
from triton_bn.plan import Device, Plan
from triton_bn.problem import FLOATING, Activation, Problem, canonical, describe
from triton_bn.sync import DISAGREE, Ranks
from triton_bn.tuning.resolve import resolve

__all__ = ["Plans", "batch_norm", "plans", "use_kernels"]

Outputs = tuple[Tensor, Tensor, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def use_kernels(x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernels: on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    return x.is_cuda or (x.device.type == "cpu" and launch.interpreting())


def _resolve(problem: Problem, x: Tensor) -> Plan:
    return resolve(problem, Device.current(x.device))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: Activation | None,
    bits: bool,
    ranks: Ranks | None = None,
) -> Outputs:
    """Training: y, stats (2, C) and, with bits, the packed slopes; running statistics advance in place.

    With ``ranks``, x is this process's part of the batch, and stats has a third row: the batch's count.
    """
    if ranks is not None:
        running = (running_mean, running_var, num_batches_tracked)
        return _forward_shared(
            ranks, x, weight, bias, running, residual, momentum, eps, activation, bits
        )
    if not use_kernels(x):
        return reference.forward(
            x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
            momentum, eps, activation, bits,
        )  # fmt: skip
    problem, x = describe(
        x,
        training=True,
        residual=residual is not None,
        activation=activation,
        bits=bits,
        cumulative=momentum is None
        and num_batches_tracked is not None
        and running_mean is not None,
    )
    return launch.forward(
        problem, _resolve(problem, x), x, weight, bias, running_mean, running_var,
        num_batches_tracked, residual, momentum, eps,
    )  # fmt: skip


def _forward_shared(
    ranks: Ranks,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: Activation | None,
    bits: bool,
) -> Outputs:
    """The halves of :func:`forward`, with the collective between them."""
    ranks.agree()
    tag, kernels, empty = FLOATING.index(x.dtype), use_kernels(x), x.numel() == 0
    if empty:
        row = x.new_zeros(2 * x.shape[1] + 2, dtype=torch.float64)
        row[-1] = tag
    elif kernels:
        problem, x = describe(
            x, training=False, residual=residual is not None, activation=activation, bits=bits
        )
        plan = _resolve(problem, x)
        row = launch.row(problem, plan, x, tag)
    else:
        row = reference.row(x, tag)
    rows = ranks.gather(row)
    if x.device.type == "cpu":
        ranks.verify(rows, FLOATING)
    stats = x.new_empty((3, x.shape[1]), dtype=reference.accumulator(x.dtype))
    if kernels:
        moments, agree = launch.merge(rows, stats[2], *running, momentum)
        if x.device.type != "cpu":
            torch._assert_async(agree, DISAGREE)
    else:
        merged = reference.merge(rows, *running, momentum)
        moments = merged[:2]
        stats[2] = merged[2]
    if empty:
        return _fake_outputs(x, bits, 3)
    mean, variance = moments.unbind()
    if kernels:
        return launch.normalize(
            problem, plan, x, mean, variance, weight, bias, residual, eps, stats
        )
    y, stats[:2], packed = normalize(
        x, mean, variance, weight, bias, residual, eps, activation, bits
    )
    return y, stats, packed


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation | None,
    bits: bool,
) -> Outputs:
    """The transform by a given mean and biased variance (C,): y, stats (2, C) and the packed slopes."""
    if not use_kernels(x):
        acc = reference.accumulator(x.dtype)
        stats = torch.stack([mean.to(acc), (variance.to(acc) + eps).rsqrt()])
        y, packed = reference.normalize(
            x, stats[0], stats[1], weight, bias, residual, activation, bits
        )
        return y, stats, packed
    problem, x = describe(
        x, training=False, residual=residual is not None, activation=activation, bits=bits
    )
    return launch.normalize(
        problem, _resolve(problem, x), x, mean, variance, weight, bias, residual, eps
    )


def backward(
    dy: Tensor,
    x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: Activation | None,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
    ranks: Ranks | None = None,
) -> Gradients:
    """dx, dweight, dbias and dresidual, each where needed.

    With ``ranks``, x is this process's part of the batch, and stats has a third row: the batch's count.
    """

    def means(sums: Tensor) -> None:
        """The sums of this process → the means over the batch."""
        assert ranks is not None
        ranks.add(sums)
        sums /= stats[2]

    if ranks is not None and dy.numel() == 0:
        if needs[0]:
            means(torch.zeros_like(stats[:2]))
        dx, dweight, dbias, dresidual = (
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip((dy, weight, bias, dy), needs, strict=True)
        )
        return dx, dweight, dbias, dresidual
    share = None if ranks is None else means
    if use_kernels(dy):
        problem, seen = describe(
            dy if x is None else x,
            direction="backward",
            # A shared batch's statistics are given, so far as plans are concerned: two launches.
            training=training and share is None,
            residual=residual is not None,
            activation=activation,
            bits=packed is not None,
        )
        return launch.backward(
            problem, _resolve(problem, dy), dy, None if x is None else seen, stats, weight, bias,
            residual, packed, needs, share,
        )  # fmt: skip
    needs_x, needs_weight, needs_bias, needs_residual = needs
    kept = (stats, weight, bias, residual, packed, activation)
    dx = dweight = dbias = dresidual = sums = None
    if needs_weight or needs_bias or (needs_x and training):
        assert x is not None
        sums = reference.backward_reduce(dy, x, *kept)
        if needs_weight and weight is not None:
            dweight = (sums[1] * stats[1]).to(weight.dtype)
        if needs_bias and bias is not None:
            dbias = sums[0].to(bias.dtype)
    if needs_x or needs_residual:
        count = dy.numel() // dy.shape[1]
        if share is not None and sums is not None and needs_x:
            sums = sums.clone()  # of which dbias may be a part
            share(sums)
            count = 1
        dx, dresidual = reference.backward_apply(dy, x, *kept, sums if training else None, count)
    return dx if needs_x else None, dweight, dbias, dresidual if needs_residual else None


class Plans(NamedTuple):
    """What a layer's call would launch, forward and backward."""

    forward: Plan
    backward: Plan

    def __str__(self) -> str:
        return f"forward   {self.forward}\nbackward  {self.backward}"


def plans(
    x: Tensor,
    *,
    training: bool,
    residual: bool = False,
    activation: Activation | None = None,
    cumulative: bool = False,
    device: Device | None = None,
) -> Plans:
    """The plans for an input (only its metadata counts) whose gradients are all wanted."""
    bits = residual and activation is not None and activation.two_slopes
    problem, _ = describe(
        x,
        training=training,
        residual=residual,
        activation=activation,
        bits=bits,
        cumulative=cumulative,
    )
    # With its slopes kept, the backward needs no residual.
    behind = replace(
        problem, direction="backward", residual=residual and not bits, cumulative=False
    )
    device = device or Device.current(x.device)
    return Plans(resolve(problem, device), resolve(behind, device))


class _BatchNorm(torch.autograd.Function):
    """Normalization by batch statistics (``training``) or by running ones, with its gradient.

    ``verbs`` are what computes: the functions above, or the operators that stand for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        verbs: Any,
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
        bits: bool,
        ranks: Any = None,
    ) -> Any:
        if training:
            y, stats, packed = verbs.forward(
                x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
                momentum, eps, activation, bits, ranks,
            )  # fmt: skip
        else:
            y, stats, packed = verbs.normalize(
                x, running_mean, running_var, weight, bias, residual, eps, activation, bits
            )
        recompute = activation is not None and not bits
        keep_x = recompute or _needs_sums(ctx.needs_input_grad[1:4], training)
        ctx.save_for_backward(
            x if keep_x else None, stats, weight, bias, residual if recompute else None,
            packed if bits else None,
        )  # fmt: skip
        ctx.verbs, ctx.training, ctx.eps, ctx.activation = verbs, training, eps, activation
        ctx.layout, ctx.ranks = y.stride(), ranks
        if verbs.all_outputs:
            ctx.mark_non_differentiable(stats, packed)
            return y, stats, packed
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight, bias, residual, packed = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:5]
        again = torch.is_grad_enabled()
        # Compiled autograd traces what eager calls have saved.
        verbs = _Operators if torch.compiler.is_compiling() else ctx.verbs
        if x is None and dy.stride() != ctx.layout:
            dy = reference.in_layout(dy, ctx.layout)
        if (again or _transformed() or _batched(dy)) and ctx.ranks is None:
            # create_graph, gradients batched by vmap, or dy with a tangent: the gradient as a function of
            # everything, in operators that have rules for all of that.
            with torch.enable_grad():
                gradients = reference.differentiable_backward(
                    dy, x, stats, weight, bias, residual, packed, ctx.activation, ctx.training,
                    ctx.eps, needs, again,
                )  # fmt: skip
        else:
            with torch.no_grad():
                gradients = verbs.backward(
                    dy, x, stats, weight, bias, residual, packed, ctx.activation, ctx.training,
                    needs, ctx.ranks,
                )  # fmt: skip
            if again:
                gradients = _only_once(gradients)
        return (None, *gradients, *[None] * 9)


def _batched(dy: Tensor) -> bool:
    """Whether many gradients come at once: ``torch.autograd.grad(..., is_grads_batched=True)``."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(dy) or functorch.is_legacy_batchedtensor(dy)


class _Verbs:
    """The functions of this module, called directly: the eager way."""

    all_outputs = False
    forward = staticmethod(forward)
    normalize = staticmethod(normalize)
    backward = staticmethod(backward)


class _Operators:
    """The same as registered operators; ``keys`` are those below autograd, while it runs."""

    all_outputs = True

    def __init__(self, keys: Any) -> None:
        self.keys = keys

    def forward(self, *arguments: Any) -> Any:
        *tensors, activation, bits, ranks = arguments
        op = torch.ops.triton_bn.forward.default
        return op.redispatch(
            self.keys, *tensors, *_flat(activation), bits, *(ranks or (None, False))
        )

    def normalize(self, *arguments: Any) -> Any:
        *tensors, activation, bits = arguments
        op = torch.ops.triton_bn.normalize.default
        return op.redispatch(self.keys, *tensors, *_flat(activation), bits)

    @staticmethod
    def backward(*arguments: Any) -> Gradients:
        *tensors, activation, training, needs, ranks = arguments
        group = None if ranks is None else ranks[0]
        gradients = torch.ops.triton_bn.backward(
            *tensors, *_flat(activation), training, needs, group
        )
        dx, dweight, dbias, dresidual = (
            g if needed else None for g, needed in zip(gradients, needs, strict=True)
        )
        return dx, dweight, dbias, dresidual


def _only_once(gradients: Gradients) -> Gradients:
    """The gradients, which raise where they are differentiated: nobody made those of a shared batch so."""
    present = [g for g in gradients if g is not None]
    error = torch._C._functions.DelayedError(
        "SyncBatchNorm has no second derivatives, as PyTorch's has none", len(present)
    )
    marked = iter(error(*(g.detach().requires_grad_() for g in present)))
    dx, dweight, dbias, dresidual = (None if g is None else next(marked) for g in gradients)
    return dx, dweight, dbias, dresidual


def _needs_sums(needs: tuple[bool, bool, bool], training: bool) -> bool:
    """Whether the gradients of (x, weight, bias) that are needed take sums over channels, so x."""
    return needs[1] or needs[2] or (needs[0] and training)


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
) -> Tensor:
    """``activation(bn(x) + residual)`` for checked arguments, a residual like x, and at least one value.

    With ``ranks``, in training, x is this process's part of the batch; a part may have no values.
    """
    if _transformed() and ranks is None:
        return reference.composite(
            x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
            training, momentum, eps, activation,
        )  # fmt: skip
    bits = _keeps_bits(x, weight, bias, residual, training, activation)
    if torch.compiler.is_compiling() or _watched(
        x, weight, bias, residual, running_mean, running_var
    ):
        if training:
            return torch.ops.triton_bn.forward(
                x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
                momentum, eps, *_flat(activation), bits, *_named(ranks),
            )[0]  # fmt: skip
        return torch.ops.triton_bn.normalize(
            x, running_mean, running_var, weight, bias, residual, eps, *_flat(activation), bits
        )[0]
    return _BatchNorm.apply(
        _Verbs, x, weight, bias, residual, running_mean, running_var, num_batches_tracked,
        training, momentum, eps, activation, bits, ranks,
    )  # fmt: skip


def _keeps_bits(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    activation: Activation | None,
) -> bool:
    """Whether the forward packs the activation's slopes for the backward."""
    if activation is None or not activation.two_slopes or not torch.is_grad_enabled():
        return False
    needs = [t is not None and t.requires_grad for t in (x, weight, bias, residual)]
    needs_sums = _needs_sums((needs[0], needs[1], needs[2]), training)
    return any(needs) and (residual is not None or not needs_sums)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _watched(*tensors: Tensor | None) -> bool:
    """Whether somebody wants to see operators: a dispatch mode, or a tensor subclass."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors))


@torch.compiler.assume_constant_result  # asked while dynamo traces; it guards the transforms itself
def _transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0


# The operators. Activations travel as (name, parameter), ranks as (name of the group, whether it is still
# to be asked); absent outputs as empty tensors.

_library = torch.library.Library("triton_bn", "DEF")
_library.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, str? activation, "
    "float? parameter, bool bits, str? group, bool ask) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "normalize(Tensor x, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, Tensor? residual, "
    "float eps, str? activation, float? parameter, bool bits) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dy, Tensor? x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? packed, str? activation, float? parameter, bool training, bool[4] needs, str? group) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _flat(activation: Activation | None) -> tuple[str | None, float | None]:
    return (None, None) if activation is None else (activation.name, activation.parameter)


def _named(ranks: Ranks | None) -> tuple[str | None, bool]:
    return (None, False) if ranks is None else (ranks.group.group_name, ranks.ask)


def _activation(name: str | None, parameter: float | None) -> Activation | None:
    return None if name is None else Activation(name, parameter)


def _absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors: list[Any]
    *tensors, name, parameter, bits, group, ask = arguments
    ranks = None if group is None else Ranks.named(group, tensors[0], ask)
    others = (_activation(name, parameter), bits, ranks)
    y, stats, packed = forward(*(*tensors, *others))
    return y, stats, _absent(y, torch.uint8) if packed is None else packed


def _normalize_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, name, parameter, bits = arguments
    others = (_activation(name, parameter), bits)
    y, stats, packed = normalize(*(*tensors, *others))
    return y, stats, _absent(y, torch.uint8) if packed is None else packed


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    dy, *_, name, parameter, training, needs, group = arguments
    ranks = None if group is None else Ranks.named(group, dy, False)
    others = (_activation(name, parameter), training, tuple(needs), ranks)
    gradients = backward(*(*arguments[:-5], *others))
    # An operator's outputs are its own: without an activation dresidual is dy itself.
    return tuple(_absent(dy) if g is None else g.clone() if g is dy else g for g in gradients)


def _autograd_op(op: str, split: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """The operator with its gradient; ``split`` reorders its arguments to those of _BatchNorm."""

    def call(keyset: Any, *arguments: Any) -> Any:
        below = keyset & torch._C._after_autograd_keyset
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _BatchNorm.apply(_Operators(below), *split(*arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.triton_bn, op).default.redispatch(below, *arguments)

    return call


def _split_forward(*arguments: Any) -> tuple[Any, ...]:
    (
        x, weight, bias, mean, var, tracked, residual, momentum, eps, name, parameter, bits,
        group, ask,
    ) = arguments  # fmt: skip
    return (
        x, weight, bias, residual, mean, var, tracked, True, momentum, eps,
        _activation(name, parameter), bits, None if group is None else (group, ask),
    )  # fmt: skip


def _split_normalize(*arguments: Any) -> tuple[Any, ...]:
    x, mean, var, weight, bias, residual, eps, name, parameter, bits = arguments
    return (
        x, weight, bias, residual, mean, var, None, False, 0.0, eps,
        _activation(name, parameter), bits,
    )  # fmt: skip


for _name, _implementation, _split in (
    ("forward", _forward_op, _split_forward),
    ("normalize", _normalize_op, _split_normalize),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd_op(_name, _split), "Autograd", with_keyset=True)
_library.impl("backward", _backward_op, "CompositeExplicitAutograd")


def _fake_outputs(x: Tensor, bits: bool, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    stats = x.new_empty((rows, x.shape[1]), dtype=reference.accumulator(x.dtype))
    if not bits:
        return y, stats, _absent(x, torch.uint8)
    view = canonical.__wrapped__(tuple(y.shape), y.stride())
    assert view is not None, "a dense tensor always has its canonical view"
    outer, channels, inner = view[0]
    return y, stats, x.new_empty((outer, (channels * inner + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("triton_bn::forward", lib=_library)
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, bits, group, _ = others
    return _fake_outputs(x, bits, 2 if group is None else 3)


@torch.library.register_fake("triton_bn::normalize", lib=_library)
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_outputs(x, others[-1])


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
    wanted = (like, weight, bias, like)
    return tuple(
        torch.empty_like(t) if needed and t is not None else _absent(dy)
        for t, needed in zip(wanted, others[-2], strict=True)
    )
