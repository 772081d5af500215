"""The verbs, by whoever computes: described, planned and launched on the kernels, or in plain torch.

Eager calls, the autograd function and the registered operators all end here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from triton_bn import reference
from triton_bn.masked import laid_out
from triton_bn.plan import Device, Plans
from triton_bn.problem import FLOATING, Activation, Problem, canonical, describe, gradient_of
from triton_bn.route import kernels
from triton_bn.route import on_gpu as use_kernels
from triton_bn.sync import DISAGREE, Ranks
from triton_bn.tuning.resolve import resolve, usual

__all__ = [
    "Gradients",
    "Outputs",
    "absent",
    "again",
    "backward",
    "fake_outputs",
    "forward",
    "normalize",
    "plans",
    "problems",
]

Outputs = tuple[Tensor, Tensor, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
    mask: Tensor | None = None,
) -> Outputs:
    """Training: y, stats (2, C) and, with bits, the packed slopes; running statistics advance in place.

    With ``ranks``, x is this process's part of the batch. Then, and with a ``mask`` (N, *), stats has a third row:
    how many values of a channel the batch has.
    """
    if ranks is not None:
        running = (running_mean, running_var, num_batches_tracked)
        return _forward_shared(
            ranks, x, weight, bias, running, residual, momentum, eps, activation, bits, mask
        )
    if not use_kernels(x):
        return reference.forward(
            x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
            momentum, eps, activation, bits, mask,
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
        masked=mask is not None,
    )
    return kernels().forward(
        problem, resolve(problem, Device.current(x.device)), x, weight, bias, running_mean, running_var,
        num_batches_tracked, residual, momentum, eps, laid_out(mask, x, True),
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
    mask: Tensor | None,
) -> Outputs:
    """The halves of :func:`forward`, with the collective between them."""
    ranks.agree()
    tag, ours, empty = FLOATING.index(x.dtype), use_kernels(x), x.numel() == 0
    if empty:
        row = x.new_zeros(2 * x.shape[1] + 2, dtype=torch.float64)
        row[-1] = tag
    elif ours:
        problem, x = describe(
            x,
            training=False,
            residual=residual is not None,
            activation=activation,
            bits=bits,
            masked=mask is not None,
        )
        plan = resolve(problem, Device.current(x.device))
        taking = laid_out(mask, x, True)
        row = kernels().row(problem, plan, x, tag, taking)
    else:
        row = reference.row(x, tag, mask)
    rows = ranks.gather(row)
    if x.device.type == "cpu":
        ranks.verify(rows, FLOATING, partly=mask is not None)
    stats = x.new_empty((3, x.shape[1]), dtype=reference.accumulator(x.dtype))
    if ours:
        moments, agree = kernels().merge(rows, stats[2], *running, momentum, mask is not None)
        if x.device.type != "cpu":
            torch._assert_async(agree, DISAGREE)
    else:
        merged = reference.merge(rows, *running, momentum)
        moments = merged[:2]
        stats[2] = merged[2]
    if empty:
        return fake_outputs(x, bits, 3)
    mean, variance = moments.unbind()
    if ours:
        return kernels().normalize(
            problem, plan, x, mean, variance, weight, bias, residual, eps, stats, taking
        )
    y, stats[:2], packed = normalize(
        x, mean, variance, weight, bias, residual, eps, activation, bits, mask
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
    mask: Tensor | None = None,
) -> Outputs:
    """The transform by a given mean and biased variance (C,): y, stats (2, C) and the packed slopes."""
    if not use_kernels(x):
        acc = reference.accumulator(x.dtype)
        stats = torch.stack([mean.to(acc), reference.inverse_std(variance.to(acc), eps)])
        y, packed = reference.normalize(
            x, stats[0], stats[1], weight, bias, residual, activation, bits, mask
        )
        return y, stats, packed
    problem, x = describe(
        x,
        training=False,
        residual=residual is not None,
        activation=activation,
        bits=bits,
        masked=mask is not None,
    )
    return kernels().normalize(
        problem,
        resolve(problem, Device.current(x.device)),
        x,
        mean,
        variance,
        weight,
        bias,
        residual,
        eps,
        taking=laid_out(mask, x, False),
    )


def again(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """The y of an earlier :func:`forward` or :func:`normalize`, of which ``stats`` is: bit for bit."""
    if not use_kernels(x):
        return reference.normalize(
            x, stats[0], stats[1], weight, bias, residual, activation, False, mask
        )[0]
    problem, x = describe(
        x,
        training=False,
        residual=residual is not None,
        activation=activation,
        masked=mask is not None,
    )
    plan = usual(problem, Device.current(x.device))
    taking = laid_out(mask, x, False)
    return kernels().again(problem, plan, x, stats, weight, bias, residual, taking)


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
    mask: Tensor | None = None,
) -> Gradients:
    """dx, dweight, dbias and dresidual, each where needed.

    ``bias`` may be ``None`` where no slope is taken of z; dbias is (C,) then, of the weight's dtype or that of stats.

    With ``ranks``, x is this process's part of the batch. ``stats`` is as :func:`forward` left it.
    """

    def means(sums: Tensor) -> None:
        """The sums of this process → the means over the batch."""
        assert ranks is not None
        ranks.add(sums)
        sums /= stats[2] if mask is None else stats[2].clamp_min(1)

    if ranks is not None and dy.numel() == 0:
        if needs[0]:
            means(torch.zeros_like(stats[:2]))
        template = next(t for t in (bias, weight, stats[1]) if t is not None)
        dx, dweight, dbias, dresidual = (
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip((dy, weight, template, dy), needs, strict=True)
        )
        return dx, dweight, dbias, dresidual
    share = None if ranks is None else means
    if use_kernels(dy):
        output = packed is not None and packed.dtype != torch.uint8
        if output:
            residual, packed = packed, None
        problem, seen = describe(
            dy if x is None else x,
            direction="backward",
            # A shared batch's statistics are given, so far as plans are concerned: two launches.
            training=training and share is None,
            residual=residual is not None and not output,
            activation=activation,
            bits=packed is not None,
            output=output,
            masked=mask is not None,
        )
        taking = laid_out(mask, dy if x is None else x, False)
        if mask is not None and problem.training:
            taking = (taking[0], stats[2])
        return kernels().backward(
            problem, resolve(problem, Device.current(dy.device)), dy, None if x is None else seen, stats,
            weight, bias, residual, packed, needs, share, taking,
        )  # fmt: skip
    if mask is not None:
        like, left = dy if x is None else x, partial(reference.selected, mask)
        x, residual = (None if t is None else left(t) for t in (x, residual))
        dx, dweight, dbias, dresidual = _by_reference(
            left(dy), x, stats, weight, bias, residual, packed, activation, training, needs, share, True
        )  # fmt: skip
        dx, dresidual = (
            None if t is None else torch.empty_like(like).copy_(left(t)) for t in (dx, dresidual)
        )
        return dx, dweight, dbias, dresidual
    return _by_reference(
        dy, x, stats, weight, bias, residual, packed, activation, training, needs, share, False
    )


def _by_reference(
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
    share: Callable[[Tensor], None] | None,
    masked: bool,
) -> Gradients:
    """:func:`backward` in plain torch. ``masked``: 0 where nothing takes part, which ``stats`` has the number of."""
    needs_x, needs_weight, needs_bias, needs_residual = needs
    kept = (stats, weight, bias, residual, packed, activation)
    dx = dweight = dbias = dresidual = sums = None
    if needs_weight or needs_bias or (needs_x and training):
        assert x is not None
        sums = reference.backward_reduce(dy, x, *kept)
        if needs_weight and weight is not None:
            dweight = (sums[1] * stats[1]).to(weight.dtype).view(weight.shape)
        if needs_bias:
            dbias = sums[0]
    if needs_x or needs_residual:
        count: int | Tensor = dy.numel() // dy.shape[1]
        if masked and training and share is None:
            count = stats[2].clamp_min(1)
        if share is not None and sums is not None and needs_x:
            sums = sums.clone()  # of which dbias may be a part
            share(sums)
            count = 1
        dx, dresidual = reference.backward_apply(dy, x, *kept, sums if training else None, count)
    return dx if needs_x else None, dweight, dbias, dresidual if needs_residual else None


def problems(
    x: Tensor,
    *,
    training: bool,
    residual: bool = False,
    activation: Activation | None = None,
    cumulative: bool = False,
) -> tuple[Problem, Problem]:
    """The problems, forward and backward, of an input (only its metadata counts), all gradients wanted."""
    bits = residual and activation is not None and activation.two_slopes
    bits = bits and activation is not None and not activation.output_tells
    problem, _ = describe(
        x,
        training=training,
        residual=residual,
        activation=activation,
        bits=bits,
        cumulative=cumulative,
    )
    return problem, gradient_of(problem)


def plans(problems: tuple[Problem, Problem], device: Device) -> Plans:
    """The plans by which problems, forward and backward, run."""
    forward, backward = problems
    return Plans(device, problems, resolve(forward, device), resolve(backward, device))


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def fake_outputs(x: Tensor, bits: bool, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    stats = x.new_empty((rows, x.shape[1]), dtype=reference.accumulator(x.dtype))
    if not bits:
        return y, stats, absent(x, torch.uint8)
    view = canonical.__wrapped__(tuple(y.shape), y.stride())
    assert view is not None, "a dense tensor always has its canonical view"
    outer, channels, inner = view[0]
    return y, stats, x.new_empty((outer, (channels * inner + 7) // 8), dtype=torch.uint8)
