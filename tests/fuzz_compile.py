"""Random problems compiled for every target under the heuristic's plans: ``make fuzz``, not part of the tests.

    python tests/fuzz_compile.py [--count 300] [--seed 0] [--jobs 2]

Nothing may fail to compile or spill; a grid has at most 2**31 - 1 programs; and the partials' places fit the
integers in which they are computed. Prints what does not hold, and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch

from triton_bn.inspection import report
from triton_bn.inspection.report import Case, KernelFacts, gradient_of
from triton_bn.plan import channel_blocks
from triton_bn.problem import ACTIVATIONS, Activation, Problem

SIZES = (1, 2, 3, 7, 16, 31, 48, 96, 205, 300, 784, 1024, 1683, 3136, 12544, 50176, 100_000)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Values of the largest problems: a little more than what 32-bit offsets reach.
MOST = 1 << 33


def draw(chance: random.Random) -> Problem:
    """A problem of any kind, forward or backward."""
    while True:
        outer, channels, inner = (chance.choice(SIZES) for _ in range(3))
        if outer * inner >= 2 and outer * channels * inner <= MOST:
            break
    if chance.random() < 0.5:  # channels_last
        outer, inner = outer * inner, 1
    dtype = chance.choice(DTYPES)
    row = channels * inner
    stride = row * chance.choice((1, 1, 2))
    vector = 16 // dtype.itemsize
    while row % vector or (outer > 1 and stride % vector):
        vector //= 2
    training = chance.random() < 0.8
    activation = Activation.of(chance.choice((None, *ACTIVATIONS)))
    residual = chance.random() < 0.5
    bits = activation is not None and activation.two_slopes and (residual or not training)
    bits = bits and chance.random() < 0.5
    cumulative = training and chance.random() < 0.1
    forward = Problem(
        "forward", outer, channels, inner, (stride, inner, 1), dtype, vector, training, activation,
        residual, bits, cumulative,
    )  # fmt: skip
    return chance.choice((forward, gradient_of(forward)))


def complaints(case: Case, kernels: tuple[KernelFacts, ...]) -> list[str]:
    problem, plan, _ = case
    found = [
        f"{kernel.kernel} spills {kernel.spilled} bytes" for kernel in kernels if kernel.spilled
    ]
    found += [
        f"{kernel.kernel}: {kernel.programs} programs"
        for kernel in kernels
        if kernel.programs >= 2**31
    ]
    if plan.reduce is not None and not problem.wide:
        blocks = channel_blocks(plan.reduce.columns, problem.inner)
        partials = 2 * plan.reduce.splits * blocks * problem.channels
        if partials >= 2**31:
            found.append(f"{partials} partials by 32-bit offsets")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="problems, each for one target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, help="compilers side by side; default: as many as CPUs")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    cases = []
    for i in range(options.count):
        target = list(report.TARGETS)[i % len(report.TARGETS)]
        cases += report.plans(draw(chance), target, search=False)
    facts = report.compile_all(cases, jobs=options.jobs, instructions=False)
    bad = [
        f"{case.target} {case.problem}, {case.plan}: {text}"
        for case, kernels in zip(cases, facts, strict=True)
        for text in complaints(case, kernels)
    ]
    print("\n".join(bad))
    print(f"{len(cases)} problems, {sum(map(len, facts))} kernels, {len(bad)} complaints")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
