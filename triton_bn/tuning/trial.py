"""A problem on scratch tensors, run under a plan: for the stopwatch, and for a look at what comes out.

What a search times it does not believe. In a run that is looked at, all memory that the launch allocates
(outputs, statistics, bits, partials) is filled with NaN first, and with the largest number where it holds
integers: else a kernel that skips a wait, or leaves something unwritten, would find the run before's right
values there. Channels have means and scales of their own, so that none can stand in for another. The first and
the last run in a row of timed ones are looked at: the first is compared with float64
(:mod:`triton_bn.oracle`), all values of it, some channels at a time; the last must have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from triton_bn import launch, oracle, reference
from triton_bn.oracle import Bounded
from triton_bn.plan import Device, Plan
from triton_bn.problem import Problem

__all__ = ["Trial", "forget", "poisoned"]

EPS, BATCHES = 1e-5, 3

#: Values that are compared at a time: float64 takes some 50 times 8 bytes of each.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}


@contextmanager
def poisoned() -> Iterator[None]:
    """Meanwhile PyTorch fills all memory that it allocates uninitialized (its own debugging aid)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills


class Scratch:
    """The inputs of a problem on the current GPU, random; one set for all plans."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.place = torch.device("cpu" if launch.interpreting() else "cuda")
        generator = torch.Generator(self.place).manual_seed(0)
        channels = problem.channels
        acc = launch.accumulator(problem)

        def vector(low: float, high: float) -> Tensor:
            t = torch.empty(channels, dtype=acc, device=self.place)
            return t.uniform_(low, high, generator=generator)

        def tensor(like: Tensor) -> Tensor:
            """Normal values; each channel with a mean and a scale of its own."""
            like.normal_(generator=generator)
            like *= vector(0.5, 2.0).to(like.dtype)[:, None]
            like += vector(-2.0, 2.0).to(like.dtype)[:, None]
            return like

        def dense() -> Tensor:
            return tensor(torch.empty(problem.sizes, dtype=problem.dtype, device=self.place))

        self.x = tensor(
            torch.empty_strided(
                problem.sizes, problem.strides, dtype=problem.dtype, device=self.place
            )
        )
        self.weight, self.bias = vector(0.5, 1.5), vector(-0.5, 0.5)
        self.running = vector(-2.0, 2.0), vector(0.5, 4.0)
        self.residual = dense() if problem.residual or problem.output else None
        self.dy = dense() if problem.direction == "backward" else None
        # All takes part: what is read and done is the same, and the results are the unmasked ones.
        self.taking: launch.Taking = launch.ALL
        if problem.masked:
            mask = torch.ones(problem.outer, problem.inner, dtype=torch.uint8, device=self.place)
            facts = torch.tensor([problem.count, 0], device=self.place)
            self.taking = mask, facts if problem.training else None
        self.stats = self.packed = self.y = None
        if self.dy is not None:
            self.stats, z = self._forward()
            if problem.bits or problem.output:
                self.y = oracle.activate(z, problem.activation).to(problem.dtype)
            if problem.bits:
                bit = oracle.slope(z.to(problem.dtype).double(), problem.activation) == 1
                self.packed = reference.pack(bit, self.dy)

    def chunks(self) -> Iterator[slice]:
        """The channels, as many at a time as can be compared."""
        step = max(CHUNK[self.place.type] // max(self.problem.count, 1), 1)
        for begin in range(0, self.problem.channels, step):
            yield slice(begin, begin + step)

    def _forward(self) -> tuple[Tensor, Tensor]:
        """What forward has left for backward: (mean, 1/std), and what it gave to the activation."""
        problem, acc = self.problem, launch.accumulator(self.problem)
        stats = torch.empty(2, problem.channels, dtype=acc, device=self.place)
        tells = problem.bits or problem.output
        activated = torch.empty(
            problem.sizes if tells else (0,), dtype=torch.float64, device=self.place
        )
        for part in self.chunks():
            x = self.x[:, part].double()
            mean, var = (t[part].double() for t in self.running)
            if problem.training:
                var, mean = torch.var_mean(x, (0, 2), correction=0)
            stats[0, part], stats[1, part] = mean, (var + EPS).rsqrt()
            if tells:
                scale = (var + EPS).rsqrt() * self.weight[part]
                z = (x - mean[:, None]) * scale[:, None] + self.bias[part].double()[:, None]
                activated[:, part] = z if self.residual is None else z + self.residual[:, part]
        return stats, activated

    def expected(self, part: slice, y: Tensor | None = None) -> dict[str, Bounded]:
        """What a launch must give for some channels, by name, with the error that it may have.

        ``y`` is what it has returned in forward: packed slopes are those of its values.
        """
        problem, training = self.problem, self.problem.training
        y = self.y if y is None else y
        residual = None if self.residual is None else self.residual[:, part]
        dy = None if self.dy is None else self.dy[:, part]
        if problem.bits:  # whose slopes are the residual's gradient, also where there is none
            residual = torch.zeros_like(self.x[:, part]) if residual is None else residual
            dy = torch.ones_like(residual) if dy is None else dy
        want = oracle.batch_norm(
            self.x[:, part], self.running[0][part], self.running[1][part], self.weight[part],
            self.bias[part], training, self.momentum, EPS, residual=residual,
            activation=problem.activation, dy=dy, interpreted=launch.interpreting(),
            moments=True, device=self.place, output=None if y is None else y[:, part],
        )  # fmt: skip
        if problem.direction == "backward":
            names = ["dx", "dweight", "dbias"]
            names += ["dresidual"] if residual is not None else []
            return {name: want[name] for name in names}
        names = ["y", "mean", "invstd"]
        names += ["running_mean", "running_var"] if training else []
        return {name: want[name] for name in names} | (
            {"slope": want["dresidual"]} if problem.bits else {}
        )

    @property
    def momentum(self) -> float:
        return 1 / (BATCHES + 1) if self.problem.cumulative else 0.1


@lru_cache(maxsize=1)
def _scratch(problem: Problem) -> Scratch:
    return Scratch(problem)


def forget() -> None:
    """Frees the scratch tensors."""
    _scratch.cache_clear()


class Trial:
    """A problem under a plan, to be run again and again: nothing that lives elsewhere is touched.

    ``device`` holds the facts of the current GPU, on which the tensors are.
    """

    def __init__(self, problem: Problem, plan: Plan, device: Device) -> None:
        self.problem, self.plan = problem, plan
        self.scratch = _scratch(problem)
        self.tracked = torch.zeros((), dtype=torch.int64, device=self.scratch.place)
        self.running = tuple(t.clone() for t in self.scratch.running)
        #: What the runs that were looked at gave, by name.
        self.found: list[dict[str, Tensor]] = []

    def __call__(self) -> None:
        """Runs once."""
        self._launch()

    def _launch(self) -> tuple[Tensor | None, ...]:
        own, s = self.problem, self.scratch
        if own.direction == "backward":
            assert s.dy is not None
            assert s.stats is not None
            needs = (True, True, True, own.residual or own.bits or own.output)
            kept = s.y if own.output else s.residual
            return launch.backward(
                own, self.plan, s.dy, s.x, s.stats, s.weight, s.bias, kept, s.packed, needs,
                taking=s.taking,
            )  # fmt: skip
        mean, var = self.running
        if own.training:
            momentum = None if own.cumulative else s.momentum
            return launch.forward(
                own, self.plan, s.x, s.weight, s.bias, mean, var, self.tracked, s.residual,
                momentum, EPS, s.taking,
            )  # fmt: skip
        return launch.normalize(
            own, self.plan, s.x, mean, var, s.weight, s.bias, s.residual, EPS, taking=s.taking
        )

    def observe(self) -> None:
        """Runs once, from the same state each time, in poisoned memory, and keeps what comes out."""
        for mine, original in zip(self.running, self.scratch.running, strict=True):
            mine.copy_(original)
        self.tracked.fill_(BATCHES)
        with poisoned():
            results = self._launch()
        if self.problem.direction == "backward":
            names = ("dx", "dweight", "dbias", "dresidual")
            found = {n: t for n, t in zip(names, results, strict=True) if t is not None}
        else:
            y, stats, packed = results
            assert y is not None
            assert stats is not None
            found = {"y": y, "mean": stats[0], "invstd": stats[1]}
            if packed is not None:
                found["packed"] = packed
            if self.problem.training:
                found["running_mean"], found["running_var"] = (t.clone() for t in self.running)
                found["num_batches_tracked"] = self.tracked.clone()
        self.found.append(found)

    def wrong(self) -> str:
        """What is wrong with the results of the runs that were looked at; nothing is ``""``."""
        first, *others = self.found
        compared = dict(first)
        counted = compared.pop("num_batches_tracked", None)
        if counted is not None and counted.item() != BATCHES + 1:
            return f"num_batches_tracked is {counted.item()} for {BATCHES + 1}"
        packed = compared.pop("packed", None)
        if packed is not None:
            bit = reference.unpack(packed, first["y"])
            act: Any = self.problem.activation
            low = act.parameter if act.name == "leaky_relu" else 0.0
            compared["slope"] = torch.where(bit, 1.0, low)
        for part in self.scratch.chunks():
            for name, want in self.scratch.expected(part, first.get("y")).items():
                value = compared[name]
                value = value[part] if value.dim() == 1 else value[:, part]
                ratio = want.ratio(value)
                if not ratio <= 1:
                    return f"{name} of channels from {part.start} is off by {ratio:.3g} times its bound"
        for other in others:
            for name, value in other.items():
                if not torch.equal(value, first[name]):
                    return f"{name} has other bits in the last run than in the first"
        return ""
