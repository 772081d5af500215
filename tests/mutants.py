"""Mutation tests: faults put into a copy of the package one at a time, each with tests that must see it.

    python tests/mutants.py [--only NAME ...] [--jobs 1] [--list]

``make mutants``; not part of ``make test``, which asks only that no entry is stale (``test_mutants.py``). Each
mutant is applied to a copy of the tree, and the tests that it names are run there, and no others: a mutant is
*killed* if one of them fails or hangs, else it has *survived*. The same tests are run on an unchanged copy first.
Exits with 1 if anything survives, is stale, or cannot be judged.

A new kind of fault gets an entry with the narrowest test that sees it. One that no test can see says why:
``equivalent``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parent.parent
#: What a copy of the tree needs of it.
NEEDED = ("triton_bn", "tests", "perf", "pyproject.toml")
#: Of a server that loads these once. It must see no GPU: what is wrong on one only, no test here could see.
PROCESSES: Any = multiprocessing.get_context("forkserver")
LOADED = ["torch", "torch.testing", "triton", "triton.language", "numpy"]
#: Seconds that a mutant's tests may take; who takes longer waits for something that never comes.
LIMIT = 300


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands once in ``file`` (of the package), becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  #: pytest's node ids, below tests/
    why: str  #: what would be wrong
    equivalent: str = ""  #: why no test can see it


def stale(mutant: Mutant) -> str:
    """What no longer fits in an entry; nothing is ``""``."""
    found = (ROOT / "triton_bn" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    if found != 1:
        return f"the old text stands {found} times in {mutant.file}"
    if mutant.old == mutant.new:
        return "the new text is the old one"
    for test in mutant.tests:
        file, _, rest = test.partition("::")
        name = rest.partition("[")[0]
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        if not re.search(rf"^def {name}\(", source, re.MULTILINE):
            return f"there is no {name} in {file}"
    if bool(mutant.equivalent) == bool(mutant.tests):
        return "it must either name tests or say why it is equivalent"
    return ""


# ---- Running -------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """A copy of the tree."""
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _run(tree: Path, tests: tuple[str, ...], output: Path, compiled: bool) -> None:
    """pytest, in a process of its own that has torch and Triton loaded already."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    if not compiled:  # what is compiled of a mutant must not be there for the next
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    here = {str(ROOT), str(ROOT / "tests"), ""}
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in here)]

    import pytest

    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    sys.exit(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


def pytest(
    tree: Path, tests: tuple[str, ...], limit: float, compiled: bool = False
) -> tuple[int | None, str]:
    """pytest's exit status in a copy of the tree, and what it said.

    ``None`` where it ran past the limit, and less than 0 where a signal ended it.
    """
    output = tree / "output"
    output.unlink(missing_ok=True)
    process = PROCESSES.Process(target=_run, args=(tree, tests, output, compiled))
    process.start()
    process.join(limit)
    hangs = process.exitcode is None
    if hangs:
        os.killpg(process.pid, 9)  # with the processes that the tests have started
        process.join()
    return None if hangs else process.exitcode, output.read_text(encoding="utf-8")


def serve() -> None:
    """Says how tests are run: in the interpreter, on one thread, the same examples each time."""
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "CI": "1",
    }
    PROCESSES.set_forkserver_preload(LOADED)


def judged(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """What became of a mutant in a copy of the tree, which is left as it was, and what pytest said."""
    if mutant.equivalent:
        return "equivalent", ""
    path = tree / "triton_bn" / mutant.file
    before, status = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, output = pytest(tree, mutant.tests, LIMIT)
    finally:
        path.write_text(before, encoding="utf-8")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    if code == 0:
        return "SURVIVED", output
    if code is None or code < 0:
        return f"killed ({'it hangs' if code is None else 'it crashes'})", output
    last = output.splitlines()[-1]  # a test or what it needs failed; not an import, say
    if code != 1 or "ERROR collecting" in output or not re.match(r"\d+ (failed|error)", last):
        return "CANNOT BE JUDGED", output
    return "killed", output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="those whose names have one of these in them"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants side by side")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument(
        "--verbose", action="store_true", help="print what pytest says of survivors"
    )
    options = parser.parse_args()
    only = options.only
    chosen = [m for m in MUTANTS if not only or any(part in m.name for part in only)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.name}: {mutant.why}")
        return 0
    rotten = [(mutant, text) for mutant in chosen if (text := stale(mutant))]
    for mutant, text in rotten:
        print(f"STALE {mutant.name}: {text}")
    chosen = [mutant for mutant in chosen if mutant not in [m for m, _ in rotten]]
    serve()
    began, counts = time.monotonic(), {"STALE": len(rotten)} if rotten else {}
    with tempfile.TemporaryDirectory(prefix="triton_bn_mutants_") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(options.jobs):
            trees.put(copied(Path(folder, str(i))))
        tree = trees.get()
        tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        code, output = pytest(tree, tests, 3600, compiled=True) if tests else (0, "")
        trees.put(tree)
        if code != 0:
            print(f"{output}\nwithout any mutant the tests fail already")
            return 1
        print(
            f"{len(tests)} tests pass in an unchanged copy: {time.monotonic() - began:.0f} s",
            flush=True,
        )

        def judge(mutant: Mutant) -> tuple[Mutant, str, str, float]:
            tree, start = trees.get(), time.monotonic()
            try:
                return mutant, *judged(mutant, tree), time.monotonic() - start
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant, result, output, seconds in pool.map(judge, chosen):
                kind = result.partition(" (")[0]
                counts[kind] = counts.get(kind, 0) + 1
                text = mutant.equivalent if kind == "equivalent" else mutant.why
                print(f"{result:10} {seconds:4.0f} s  {mutant.name}: {text}", flush=True)
                if options.verbose and kind.isupper():
                    print(output)
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"{len(chosen) + len(rotten)} mutants: {summary}; {time.monotonic() - began:.0f} s")
    return int(any(kind.isupper() for kind in counts))


# ---- The table -----------------------------------------------------------------------------------

FUNCTIONAL, LAUNCH, MODULES = (
    "test_functional.py::test_",
    "test_launch.py::test_",
    "test_modules.py::test_",
)
PLAN, PROBLEM, TRIAL = "test_plan.py::test_", "test_problem.py::test_", "test_trial.py::test_"
HOST, SYNC, RECOMPUTE = "test_host.py::test_", "test_sync.py::test_", "test_recompute.py::test_"
WIDE, MEMORY, TUNE, CACHE = (
    "test_wide.py::test_",
    "test_memory.py::test_",
    "test_tune.py::test_",
    "test_cache.py::test_",
)
CONVERT, SURGERY, ROUTE = "test_convert.py::test_", "test_surgery.py::test_", "test_route.py::test_"

#: Every candidate of a problem: with bits and a ragged row, in float64, with a curved activation and a residual.
BITS = (f"{LAUNCH}every_candidate_is_right[S=9 with bits]",)
DOUBLE = (f"{LAUNCH}every_candidate_is_right[S=50]",)
CURVED = (f"{LAUNCH}every_candidate_is_right[S=1]",)
#: Plans given by hand, one streamed program: windows that are smaller than a channel, and larger than many.
WINDOWS = tuple(
    f"{LAUNCH}streamed_waits_for_all_that_it_reads[1-{case}]"
    for case in ("shape0-8-1-1", "shape1-8-2-2", "shape2-8-3-1", "shape3-16-1-2")
)
INFINITE = tuple(
    f"{LAUNCH}a_channel_with_an_infinity_has_the_mean_that_float64_gives[{choice}-{layout}]"
    for choice, layout in ((0, "contiguous"), (1, "contiguous"), (2, "channels_last"))
)
RACE = "test_interleave.py::test_no_schedule_makes_a_race"
FAR = f"{FUNCTIONAL}a_mean_far_from_zero_costs_the_variance_nothing[kernels-10000.0-contiguous"
SPECIAL = f"{FUNCTIONAL}an_activation_is_pytorchs_at_every_special_point[kernels-torch.float32"
BEYOND = f"{FUNCTIONAL}a_variance_beyond_float32_is_infinite_and_normalizes_to_the_bias[kernels-torch.float32"
BAD = f"{FUNCTIONAL}bad_input_raises_what_pytorch_raises_and_changes_nothing[kernels"
KEY = (f"{HOST}a_launch_is_the_one_that_triton_would_find",)
LEGAL = (f"{PLAN}every_candidate_is_legal",)


def ranks(*checks: str) -> tuple[str, ...]:
    return tuple(f"{SYNC}ranks[{name}]" for name in checks)


M = Mutant
# fmt: off
MUTANTS = [
    # Tiles: offsets, masks, and who writes what there is once a channel.
    M("row length in 32 bits", "kernels/tile.py",
      "return index(channels, T) * inner //", "return channels * inner //",
      (f"{WIDE}a_row_of_more_than_2_to_the_31_values[split]",),
      "a row of 2**31 values has a negative length, and nothing of it is written"),
    M("row offsets in 32 bits", "kernels/tile.py",
      "i_row = index(n + tl.arange(0, T.R), T)", "i_row = n + tl.arange(0, T.R)",
      (f"{WIDE}values_that_lie_far_apart[resident-rows]",), "rows beyond 2**31 values are read elsewhere"),
    M("split's first row in 32 bits", "kernels/tile.py",
      "begin = index(i_split, T) * rows", "begin = i_split * rows", (),
      "a split's rows begin elsewhere",
      "the number of rows fits 32 bits, and the rows' offsets are widened by themselves (row offsets in 32 bits)"),
    M("resident's first column in 32 bits", "kernels/forward.py",
      "begin = index(tl.program_id(0), T) * (T.CHANNELS * T.INNER)",
      "begin = tl.program_id(0) * (T.CHANNELS * T.INNER)",
      (f"{WIDE}a_row_of_more_than_2_to_the_31_values[resident]",), "columns beyond 2**31 values are read elsewhere"),
    M("masked load without other", "kernels/tile.py",
      "mask=mask, other=0.0, eviction_policy=POLICY", "mask=mask, eviction_policy=POLICY", WINDOWS[:1],
      "on a GPU what is masked off is whatever was in the register"),
    M("bits beyond the row", "kernels/forward.py",
      "mask = (n + tl.arange(0, T.R) < n_end)[:, None] & (byte * 8 < columns.end)[None, :]",
      "mask = (n + tl.arange(0, T.R) < n_end)[:, None] & (byte >= 0)[None, :]", BITS,
      "a row's last tile writes the next row's bits"),
    M("second channel beyond the last", "kernels/tile.py",
      "second = tl.where(edge < end, first + 1, first)", "second = first + 1", WINDOWS,
      "the last tile reads a weight that is not there"),
    M("second channel's vector", "kernels/tile.py",
      "second = tl.load(p + columns.second * stride)", "second = tl.load(p + columns.first * stride)", WINDOWS[2:3],
      "a tile of two channels transforms both by the first's weight"),
    M("a channel more than touched", "kernels/tile.py",
      "channel * sizes[2] < columns.begin + T.K", "channel * sizes[2] <= columns.begin + T.K",
      (f"{MEMORY}no_partial_is_stored_for_a_channel_that_a_tile_does_not_touch[split]",),
      "sums of a channel that the tile does not touch are written over another's"),
    M("every split owns", "kernels/tile.py",
      "tl.where(i_split == 0, sizes[1], 0)", "tl.where(i_split >= 0, sizes[1], 0)", WINDOWS[1:2],
      "running statistics advance once a split"),
    M("every block owns", "kernels/tile.py",
      "(channel * sizes[2] // T.K == i_block) & (channel < limit)", "channel < limit", WINDOWS[:1],
      "running statistics advance once a block of a channel"),
    M("eps under a constant channel", "kernels/tile.py",
      "return tl.where(v == 0, eps[2], tl.where(small, root * 16777216.0, root))",
      "return tl.where(small, root * 16777216.0, root)",
      (f"{LAUNCH}a_constant_channel_under_an_eps_that_float32_cannot_hold[contiguous-0-1e-60]",),
      "0 * inf: NaN instead of the bias"),
    M("smallest numbers unscaled", "kernels/tile.py",
      "small = v < 1e-35", "small = v < 0.0", (), "a GPU's rsqrt takes a denormal number for 0",
      "NumPy, which computes for the interpreter, does not"),
    M("momentum as one float32", "kernels/tile.py",
      "return tl.cast(pair[0], ACC) + tl.cast(pair[1], ACC)", "return tl.cast(pair[0], ACC)", DOUBLE,
      "float64 running statistics have seven digits"),

    # Moments.
    M("no shift", "kernels/moments.py", "origin = finite(first)", "origin = finite(first) * 0",
      (f"{FAR}-split]",), "a mean far from 0 takes the variance's digits"),
    M("infinite shift", "kernels/moments.py", "origin = finite(first)", "origin = first", INFINITE,
      "inf - inf: the mean is NaN where float64 says inf"),
    M("infinite base", "kernels/moments.py",
      "return finite(tl.load(p_x + o, mask=mask, other=0.0).to(tl.dtype(T.ACC)))",
      "return tl.load(p_x + o, mask=mask, other=0.0).to(tl.dtype(T.ACC))", (),
      "the mean is relative to an infinity",
      "it is added last, and a channel whose first value is infinite or NaN has that for its mean, or NaN, anyway"),
    M("infinite means merged", "kernels/moments.py",
      "mean = a.mean * (1 - share) + b.mean * share", "mean = a.mean + delta * share", INFINITE,
      "inf - inf: the mean is NaN where float64 says inf"),
    M("no term between two sets", "kernels/moments.py",
      "a.m2 + b.m2 + delta * (a.count * share) * delta", "a.m2 + b.m2", WINDOWS[1:2],
      "the variance between chunks is left out"),
    M("no term between many sets", "kernels/moments.py",
      "tl.sum(a.m2 + a.count * delta * delta, axis)", "tl.sum(a.m2, axis)", WINDOWS[:1],
      "the variance between slots is left out"),
    M("merged mean uncorrected", "kernels/moments.py",
      "delta -= tl.expand_dims(rest, axis)\n    return Moments(count, mean + rest,", "return Moments(count, mean,",
      (), "what rounding took from the mean of slots is lost",
      "it is less than what rounding takes from partials relative to the first value, which every bound grants"),
    M("infinite held variance", "kernels/moments.py",
      'return tl.where(square == float("inf"), square, tl.where(m2 < 0, 0, m2))', "return tl.where(m2 < 0, 0, m2)",
      (f"{BEYOND}-resident]",), "inf - inf: NaN instead of the bias"),
    M("infinite merged variance", "kernels/moments.py",
      'tl.where(a.m2 == a.m2, a.m2, float("inf"))', "a.m2", (f"{BEYOND}-split]",),
      "inf - inf: NaN instead of the bias"),
    M("rows beyond the last", "kernels/moments.py",
      "d = tl.where(i_row + u * T.R < n_end, d, 0)", "d = tl.where(i_row >= 0, d, 0)", DOUBLE,
      "what is masked off counts as minus the shift"),
    M("held mean uncorrected", "kernels/moments.py",
      "rest = finite(fold_sums(total, columns, T) / count)", "rest = finite(fold_sums(total, columns, T) / count) * 0",
      (f"{FUNCTIONAL}a_mean_is_corrected_by_the_deviations_from_it[kernels-contiguous]",),
      "what rounding took from the mean is lost"),
    M("held deviations from 0", "kernels/moments.py",
      "center = spread(mean, columns, T)", "center = spread(mean * 0, columns, T)", (f"{FAR}-resident]",),
      "a mean far from 0 takes the variance's digits"),
    M("partial before its buffer", "kernels/moments.py",
      "written = a.count > 0", "written = channel < sizes[1]",
      (f"{MEMORY}no_partial_is_stored_for_a_channel_that_a_tile_does_not_touch[split]",),
      "the mean of a channel that the tile does not touch is written over another's"),
    M("counter in every program", "kernels/moments.py", "if pid == 0:", "if pid >= 0:",
      (f"{TRIAL}nothing_is_wrong_with_what_is_right[cumulative]",), "a batch counts as many"),
    M("counter in every resident program", "kernels/forward.py", "if first == 0:", "if first >= 0:",
      (f"{TRIAL}nothing_is_wrong_with_what_is_right[vectors]",), "a batch counts as many"),

    # Activations.
    M("elu near 0", "kernels/activation.py",
      "tl.where(z > -0.25, z * series, tl.exp(z) - 1)", "tl.exp(z) - 1", (f"{SPECIAL}-elu]", f"{SPECIAL}-tanh]"),
      "exp(z) - 1 cancels"),
    M("relu of NaN", "kernels/activation.py",
      'T.KIND == "relu":\n        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)',
      'T.KIND == "relu":\n        return tl.maximum(z, 0.0)', (f"{SPECIAL}-relu]",), "NaN becomes 0"),
    M("slope of relu at 0", "kernels/activation.py", "return (z <= 0) == 0", "return (z < 0) == 0",
      (f"{SPECIAL}-relu]",), "PyTorch's is 0"),
    M("slope of relu6 at 6", "kernels/activation.py", "(z >= 6)", "(z > 6)", (f"{SPECIAL}-relu6]",), "PyTorch's is 0"),
    M("slope of gelu", "kernels/activation.py",
      "normal_cdf(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327", "normal_cdf(z)", CURVED,
      "the density's term is left out"),
    M("steep leaky_relu as a maximum", "kernels/activation.py",
      "if T.PARAMETER > 0 and T.PARAMETER <= 1:", "if T.PARAMETER > 0:",
      (f"{SPECIAL}-leaky_relu(1.5)]",), "with a slope above 1 the maximum is the wrong piece"),

    # Forward.
    M("residual behind the activation", "kernels/forward.py",
      "store_dense(p_y, select(takes, u, activate(z, T)),",
      "bare = preactivation(x, (), u, affine, T)\n    "
      "store_dense(p_y, select(takes, u, activate(bare, T) + (z - bare)),",
      BITS, "y = act(bn(x)) + residual"),
    M("uncentred transform", "kernels/forward.py",
      "z = tl.fma(x[u].to(tl.dtype(T.ACC)) - affine.mean, affine.scale, affine.bias)",
      "z = tl.fma(x[u].to(tl.dtype(T.ACC)), affine.scale, affine.bias - affine.mean * affine.scale)",
      (f"{FUNCTIONAL}a_constant_channel_becomes_its_bias[kernels-torch.float32-resident]",),
      "the digits that x and mean share are lost"),
    M("biased running variance", "kernels/forward.py",
      "factor * (a.m2 / (a.count - 1))", "factor * (a.m2 / a.count)",
      (f"{FUNCTIONAL}running_statistics_move_by_the_momentum[kernels-0.9]",), "running_var is the unbiased one"),
    M("unbiased variance", "kernels/forward.py",
      "inverse_std(a.m2 / tl.maximum(a.count, 1), eps, T)", "inverse_std(a.m2 / (a.count - 1), eps, T)", WINDOWS[:1],
      "y is by the biased one"),
    M("momentum backwards", "kernels/forward.py",
      "mean = (1 - factor) * old_mean + factor * a.mean", "mean = factor * old_mean + (1 - factor) * a.mean",
      (f"{FUNCTIONAL}running_statistics_move_by_the_momentum[kernels-0.9]",),
      "the old mean weighs what the new one should"),
    M("cumulative factor", "kernels/forward.py", "factor = 1 / tl.load(running[2])",
      "factor = 1 / (1 + tl.load(running[2]))",
      (f"{MODULES}without_momentum_the_statistics_are_the_average_of_all_batches[kernels]",),
      "the average counts one batch more"),
    M("bits upside down", "kernels/forward.py", "bit = steep(rounded, T) &", "bit = (steep(rounded, T) == 0) &", BITS,
      "gradients pass where the activation is flat"),
    M("bits in another order", "kernels/forward.py",
      "(T.R, T.K // 8, 8)) << tl.arange(0, 8)[None, None, :]",
      "(T.R, T.K // 8, 8)) << (7 - tl.arange(0, 8))[None, None, :]",
      BITS, "a value's slope is a neighbour's"),

    # Backward.
    M("dx without sum(g)", "kernels/backward.py",
      "Sums(-affine.scale * spread(sums.g / m, columns, T),", "Sums(0 * affine.scale,", WINDOWS[:1], "a term of dx"),
    M("dx without sum(g * (x - mean))", "kernels/backward.py", "-affine.scale * product)", "0 * product)", WINDOWS[:1],
      "a term of dx"),
    M("dx with 1/std once", "kernels/backward.py", "columns, T) * invstd * invstd", "columns, T) * invstd", WINDOWS[:1],
      "a factor of dx"),
    M("dx uncentred", "kernels/backward.py",
      "dx = tl.fma(x[u].to(tl.dtype(T.ACC)) - affine.mean, lost.product, dx)",
      "dx = tl.fma(x[u].to(tl.dtype(T.ACC)), lost.product, dx)", WINDOWS[:1], "a term of dx"),
    M("sums uncentred", "kernels/backward.py",
      "select(takes, u, x[u].to(tl.dtype(T.ACC)) - affine.mean)",
      "select(takes, u, x[u].to(tl.dtype(T.ACC)))", WINDOWS[:1], "dweight and dx"),
    M("dweight without 1/std", "kernels/backward.py",
      "tl.cast(sums.product * invstd,", "tl.cast(sums.product + 0 * invstd,", WINDOWS[:1], "a factor of dweight"),
    M("every program stores the parameters' gradients", "kernels/backward.py",
      "store_parameters(dparameters, sums, p_stats, channel, owner, sizes[1], T)",
      "store_parameters(dparameters, sums, p_stats, channel, channel < sizes[1], sizes[1], T)",
      (f"{RACE}[many channels a block-split]",), "two programs write the same place"),
    M("bits read upside down", "kernels/backward.py", "return tl.reshape(bit, (T.R, T.K)) != 0",
      "return tl.reshape(bit, (T.R, T.K)) == 0", BITS, "gradients pass where the activation is flat"),
    M("slope upside down where y tells it", "kernels/backward.py",
      "bit = steep(residual[u].to(tl.dtype(T.ACC)), T)", "bit = steep(residual[u].to(tl.dtype(T.ACC)), T) == 0",
      (f"{FUNCTIONAL}any_subset_of_inputs_may_want_a_gradient[kernels-residual-leaky_relu-training]",),
      "gradients pass where the activation is flat"),
    M("slope without the residual", "kernels/backward.py",
      "preactivation(x, residual, u, affine, T), T)", "preactivation(x, (), u, affine, T), T)", CURVED,
      "the slope is taken at bn(x)"),
    M("running statistics differentiated", "kernels/backward.py",
      "if TRAINING:\n            lost = project(", "if T.K > 0:\n            lost = project(",
      (f"{TRIAL}nothing_is_wrong_with_what_is_right[backward evaluation]",), "they do not depend on x"),

    # Streamed: waits.
    M("no wait", "kernels/streamed.py",
      '0, sem="acquire") < items', '0, sem="acquire") < 0', (f"{RACE}[a channel of several windows-streamed]",),
      "the transform reads moments that are not there yet"),
    M("wait for the windows beside it", "kernels/streamed.py",
      "range(first // window, last // window + 1)",
      "range(tl.maximum(i_block // window - 1, 0), tl.minimum(i_block // window + 2, tl.cdiv(n_blocks, window)))",
      (f"{RACE}[a channel of several windows-streamed]",), "a channel of several windows is transformed by a part"),
    M("relaxed wait", "kernels/streamed.py",
      '0, sem="acquire") < items', '0, sem="relaxed") < items', (f"{RACE}[one window-streamed]",),
      "what others have written may not be seen"),
    M("relaxed publication", "kernels/streamed.py",
      '+ i_window, 1, sem="acq_rel")', '+ i_window, 1, sem="relaxed")', (f"{RACE}[one window-streamed]",),
      "the count may be seen before the moments"),
    M("no barrier before publication", "kernels/streamed.py",
      "tl.debug_barrier()\n    tl.atomic_add(p_counters + 1 + i_window", "tl.atomic_add(p_counters + 1 + i_window",
      (f"{RACE}[one window-streamed]",), "other threads of the program may not have written yet"),
    M("no barrier behind the wait", "kernels/streamed.py",
      "pass\n    tl.debug_barrier()", "pass", (f"{RACE}[one window-streamed]",),
      "other threads of the program do not wait"),
    M("second phase one window behind", "kernels/streamed.py",
      "ahead = tl.maximum(tl.cdiv(partial[2] - 1, window), 1)", "ahead = tl.cdiv(window, window)",
      ("test_interleave.py::test_few_programs_at_a_time_do_not_deadlock[1]",),
      "an item waits for a ticket that nobody can draw"),

    # Several processes.
    M("ranks always agree", "kernels/ranks.py", "((differ == 0) & (alone == 0))", "(alone == 0)",
      (f"{SYNC}the_kernel_sees_whether_the_ranks_agree",), "ranks of other dtypes are merged"),
    M("agreement before there is one", "modules.py", "if not ranks.ask:", "if ranks.channels:",
      ranks("ranks_disagree_on_num_features-3"), "one rank asks at the next step and the others do not"),
    M("errors of one rank alone", "modules.py", "with ranks.together():", "if ranks.channels:",
      ranks("a_rank_is_given_what_is_wrong-3"), "the others normalize with that rank's next batch"),
    M("asked at every step", "modules.py", "self._agreed = group", "self._agreed = None",
      ranks("one_collective_forward_and_one_backward-2"), "one more collective a step"),
    M("an error is sent twice", "sync.py", "if not self.sent:", "if self.channels:",
      ranks("a_rank_runs_out_of_memory-kernels-3"), "a rank that fails behind the collective is one ahead"),
    M("a group is copied", "modules.py", "memo[id(self.process_group)] = self.process_group", "memo[0] = None",
      ranks("a_copy_asks_again-2"), "a process group cannot be"),
    M("a copy has agreed", "modules.py", 'if name != "_agreed"}', 'if name != ""}',
      ranks("a_copy_asks_again-2"), "the copy asks on one rank and not on another"),
    M("one value on all ranks", "sync.py", "if sum(counts) == 1 and not partly:",
      "if sum(counts) == -1 and not partly:",
      ranks("one_value_on_all_ranks_together-3"), "a variance of nothing"),

    # Launches.
    M("no lock in the interpreter", "launch.py", "with _interpreter:", "if kernel:",
      (f"{LAUNCH}threads_do_not_disturb_one_another",), "threads compute with one another's grid"),
    M("key without device", "launch.py", "key: list[Any] = [device]", "key: list[Any] = [0]",
      (f"{HOST}a_launch_belongs_to_its_device",), "a binary of another GPU"),
    M("key without dtype", "launch.py", "key.append(tensor.dtype)", "key.append(0)", KEY,
      "float16 parameters in a kernel for float32"),
    M("key without absence", "launch.py", "key.append(None)", "pass", KEY, "a bias in the place of a weight"),
    M("key without alignment", "launch.py", "tensor.data_ptr() & 15", "tensor.data_ptr() & 0", KEY,
      "a misaligned tensor in a kernel of 16-byte accesses"),
    M("key with too coarse an alignment", "launch.py", "tensor.data_ptr() & 15", "tensor.data_ptr() & 7", KEY,
      "8 bytes off is not aligned either"),
    M("key of the input alone", "launch.py",
      "given = (x, residual, taking[0], weight, bias, running_mean, running_var, num_batches_tracked)", "given = (x,)",
      KEY, "a misaligned weight in a kernel of 16-byte accesses"),
    M("launches without the activation", "problem.py",
      "activation: Activation | None = None\n    residual: bool = False",
      'activation: Activation | None = __import__("dataclasses").field(default=None, compare=False)\n'
      "    residual: bool = False", KEY,
      "relu and no activation share a kernel"),
    M("launches without the sizes", "problem.py", "    outer: int\n",
      '    outer: int = __import__("dataclasses").field(compare=False)\n',
      (f"{HOST}the_second_call_finds_its_launches_by_one_look_up",),
      "the grid and the sizes of another launch"),
    M("a dtype among the constants", "launch.py",
      "PARAMETER=act and act.parameter,", "PARAMETER=act.parameter if act else problem.dtype,", KEY,
      "Triton's hooks get the constants as JSON"),
    M("half of a double", "launch.py", "return high, value - high", "return high, 0.0", DOUBLE,
      "float64 running statistics have seven digits"),
    M("unmasked last resident program", "launch.py",
      "\n        or problem.channels % plan.channels != 0", "",
      (f"{MEMORY}the_last_program_of_whole_channels_reads_no_others",), "it reads beyond the tensors"),
    M("unmasked last tile", "launch.py",
      '"MASKED": problem.row % tile.columns != 0', '"MASKED": False', WINDOWS[:1], "it reads beyond the tensors"),
    M("ragged tiles taken for whole", "launch.py",
      "WHOLE=problem.outer // tile.rows", "WHOLE=-(-problem.outer // tile.rows)",
      (f"{LAUNCH}every_candidate_is_right[S=9 with bits]",), "rows beyond the last are read"),
    M("partials by the other tile's columns", "launch.py",
      '["K_PARTIAL"] = partial.columns', '["K_PARTIAL"] = tile.columns',
      (f"{LAUNCH}the_two_launches_of_split_may_have_tiles_of_their_own",), "partials of other channels are merged"),
    M("a counter for each window but one", "launch.py",
      "torch.zeros(1 + windows,", "torch.zeros(windows,", WINDOWS[:1], "the last window is counted beyond the buffer"),
    M("dy in its own layout", "launch.py", "dy = aligned_like(dy, like)", "dy = dy + 0",
      (f"{FUNCTIONAL}the_gradient_of_y_may_have_any_layout[kernels-silu-training]",), "dy is read in x's order"),
    M("residual in its own layout", "launch.py",
      "y, stats, packed = _outputs(problem, x)\n    if residual is not None:",
      "y, stats, packed = _outputs(problem, x)\n    if packed is not None and residual is not None:",
      (f"{LAUNCH}every_candidate_is_right[sliced channels_last]",), "a residual is read in x's order"),

    # Problems, and the errors at the boundary.
    M("gaps between dimensions", "problem.py",
      "if strides[first] != strides[second] * shape[second]:", "if strides[first] < strides[second]:",
      (f"{PROBLEM}an_input_without_a_view_has_none",), "a cropped image is read as if it were whole"),
    M("outputs in another order", "problem.py",
      "if dense is None or dense[0] != sizes:", "if dense is None:",
      (f"{PROBLEM}windows_that_overlap_are_read_as_their_outputs_lie",), "y is written in another order"),
    M("misaligned input", "problem.py",
      "misaligned % (vector * dtype.itemsize) or any(", "any(",
      (f"{PROBLEM}what_is_read_in_one_access_is_adjacent_and_aligned",), "16-byte accesses fault"),
    M("64-bit offsets too late", "problem.py", ">= 2**31 - 2**24", ">= 2**31",
      (f"{PROBLEM}64_bit_offsets_are_taken_exactly_where_32_bits_would_not_do",),
      "a tile's offsets pass 2**31 before its mask"),
    M("misaligned others", "problem.py", "if same and tensor.data_ptr() % 16 == 0:", "if same:",
      (f"{PROBLEM}a_tensor_is_copied_only_to_change_its_layout_or_alignment",), "16-byte accesses fault"),
    M("one value a channel passes", "problem.py",
      "if few and math.prod(shape[:1]) * math.prod(shape[2:]) == 1:", "if math.prod(shape) == -1:",
      (f"{BAD}-one value in space]",), "a variance of nothing"),
    M("eps 0 passes", "problem.py", "if eps <= 0.0:", "if eps < 0.0:", (f"{BAD}-eps zero in training]",),
      "PyTorch refuses"),
    M("half of the statistics passes", "problem.py",
      "elif (running_mean is None) != (running_var is None):", "elif running_mean is running_var is False:",
      (f"{BAD}-training without mean]", f"{BAD}-training without variance]"), "PyTorch refuses"),
    M("wrong lengths pass", "problem.py", "if tensor.numel() != channels:", "if tensor.numel() > 2 * channels:",
      (f"{BAD}-mean too short]", f"{BAD}-bias too long]"), "memory beyond a tensor is read"),
    M("other devices pass", "problem.py", "if tensor.device != device:", "if tensor.device is None:",
      (f"{BAD}-weight elsewhere]",), "a pointer of another device"),
    M("mixed dtypes pass", "problem.py",
      "if own != dtype and (own != torch.float32 or dtype == torch.float64):", "if own is None:",
      (f"{BAD}-weight in float64]", f"{BAD}-float64 beside float32]"), "PyTorch refuses"),
    M("parameters of two dtypes pass", "problem.py", "if shared is not None:", "if shared == torch.int64:",
      (f"{BAD}-float16 beside both]",), "PyTorch refuses"),
    M("statistics that want gradients pass", "problem.py", "if buffer.requires_grad:", "if buffer.is_sparse:",
      (f"{BAD}-mean that wants a gradient]",), "PyTorch refuses"),
    M("one place for all channels' statistics", "problem.py",
      "if training and channels > 1 and buffer.stride(0) == 0:", "if training and channels < 1:",
      (f"{FUNCTIONAL}running_statistics_may_be_columns_of_a_table[kernels-training]",),
      "they advance by the last channel's"),

    # Plans.
    M("streamed beyond what L2 holds", "plan.py",
      "if streamed_span(problem, tile.columns, window) > HELD:", "if window < 0:",
      (f"{PLAN}a_channel_of_several_windows_may_stream_unless_l2_loses_it",), "every value is read from memory twice"),
    M("twice what a resident program holds", "plan.py",
      "return RESIDENT[problem.direction] // each, THREAD // each",
      "return 2 * RESIDENT[problem.direction] // each, 2 * THREAD // each",
      LEGAL, "registers spill"),
    M("as many float64 values", "plan.py",
      "each = (2 if problem.dtype == torch.float64 else 1)", "each = (1 if problem.dtype else 1)", LEGAL,
      "registers spill"),
    M("cumulative resident plans", "plan.py",
      "if problem.cumulative:\n        # Every", "if problem.cumulative is None:\n        # Every",
      (f"{PLAN}cumulative_problems_are_never_resident",), "programs read a counter that one of them advances"),
    M("cumulative streamed plans", "plan.py",
      "and problem.training and large) or problem.cumulative:", "and problem.training and large):", LEGAL,
      "programs read a counter that one of them advances"),
    M("streamed without NVIDIA", "plan.py", 'device.arch.startswith("sm_") and problem.training', "problem.training",
      LEGAL, "on AMD a spinning wait loses its load"),
    M("tiles that share a byte of bits", "plan.py",
      "and columns > max(2 * vector, 8)", "and columns > 2 * vector", LEGAL, "two programs write the same byte"),
    M("programs that share a byte of bits", "plan.py",
      "unit = 8 if problem.bits else 16 // problem.itemsize", "unit = 16 // problem.itemsize", LEGAL,
      "two programs write the same byte"),
    M("splits without rows", "plan.py",
      "return -(-chunks // -(-chunks // max(most, 1)))", "return min(chunks, max(most, 1))", LEGAL,
      "programs that have nothing to do"),
    M("more shared memory than there is", "plan.py",
      "return tile if _copied(problem, tile) <= SHARED else", "return tile if tile.stages else", (),
      "the launch fails", "no tile that is planned today comes near: it is for those of tomorrow"),

    # Autograd, and what stands above the kernels.
    M("x kept in vain", "autograd.py", "keep_x = recompute or needs_sums", "keep_x = True",
      (f"{FUNCTIONAL}with_frozen_parameters_in_eval_backward_does_not_keep_x[kernels-plain]",), "memory"),
    M("bias kept in vain", "autograd.py", "weight, bias if recompute else None,", "weight, bias,",
      (f"{FUNCTIONAL}the_bias_may_change_before_backward_where_no_gradient_depends_on_it[kernels-weight-training]",),
      "an optimizer's step before backward raises"),
    M("dy of any layout without x", "autograd.py", "if x is None and dy.stride() != ctx.layout:",
      "if dy.stride() is None:",
      (f"{FUNCTIONAL}the_gradient_of_y_may_have_any_layout[kernels-relu-eval]",),
      "dy is read in another order than bits"),
    M("residual of another dtype fused", "functional.py",
      "return residual.dtype == input.dtype", "return True",
      (f"{FUNCTIONAL}a_residual_is_added_as_pytorch_adds[kernels-(5, 3, 4)-torch.float64-training]",), "+ promotes"),
    M("statistics with strides lost", "functional.py", "given.copy_(dense)", "dense.copy_(given)",
      (f"{FUNCTIONAL}running_statistics_may_be_columns_of_a_table[kernels-training]",), "they never advance"),
    M("weights with strides", "functional.py", "weight = weight.contiguous()", "weight = weight.detach() + 0",
      (f"{FUNCTIONAL}a_parameter_may_be_a_view_with_strides[kernels-training]",), "its gradient is lost"),
    M("counter elsewhere", "functional.py", "and num_batches_tracked.device != input.device", "and input is None",
      (f"{MODULES}a_counter_may_lie_elsewhere[kernels]",), "a pointer of another device"),
    M("no way to torch.func", "route.py", "or transformed()) and not shared", ") and not shared",
      (f"{ROUTE}who_computes_a_gpu_tensor[forward AD]",), "kernels cannot be differentiated forward"),
    M("subclasses in kernels", "route.py", "if not kinds <= _PLAIN:", "if not kinds:",
      (f"{ROUTE}who_computes_a_gpu_tensor[subclass]",), "a DTensor's part is taken for the whole"),
    M("operators in exported programs", "route.py", "ours = batch_statistics and not exporting and",
      "ours = batch_statistics and",
      (f"{ROUTE}who_computes_a_gpu_tensor[export]",), "the program needs this package"),

    # Trials and tuning.
    M("no poison", "tuning/trial.py", "with poisoned():\n            results", "if self.plan:\n            results",
      (f"{TRIAL}whatever_a_launch_allocates_is_poisoned",),
      "the run before's results look right"),
    M("no comparison", "tuning/trial.py", "if not ratio <= 1:", "if ratio < 0:",
      (f"{TRIAL}what_is_left_unwritten_is_seen[forward]",), "the fastest plan is the one that skips its work"),
    M("NaN passes", "tuning/trial.py", "if not ratio <= 1:", "if 1 < ratio < 1e30:",
      (f"{TRIAL}what_is_left_unwritten_is_seen[forward]",), "poison is not seen"),
    M("runs are not compared", "tuning/trial.py", "if not torch.equal(value, first[name]):", "if not value.numel():",
      (f"{TRIAL}two_runs_must_have_the_same_bits",), "a race that happens now and then"),
    M("counter unseen", "tuning/trial.py", "counted.item() != BATCHES + 1:", "counted.item() < 0:",
      (f"{TRIAL}a_counter_that_does_not_count_is_seen",), "a batch counts as many"),
    M("statistics of the run before", "tuning/trial.py", "mine.copy_(original)", "mine.copy_(mine)",
      (f"{TRIAL}nothing_is_wrong_with_what_is_right[forward]",), "what is right is called wrong"),
    M("poison for ever", "tuning/trial.py", "torch.use_deterministic_algorithms(before[0], warn_only=before[1])",
      "pass",
      (f"{TRIAL}memory_is_poisoned_only_meanwhile",), "all the process is slow"),
    M("memo of a second record", "tuning/memory.py",
      "if not _records:\n            _kept = memo", "if memo is not None:\n            _kept = memo",
      (f"{TUNE}two_may_record_at_once_and_no_plan_is_lost",), "tuned plans are forgotten"),
    M("memo back too early", "tuning/memory.py",
      "if not _records:\n                memo = _kept", "if seen is not None:\n                memo = _kept",
      (f"{TUNE}two_may_record_at_once_and_no_plan_is_lost",), "the other sees nothing any more"),
    M("any plan from a file", "tuning/memory.py", "if plan == stored:", "if stored is not None:",
      (f"{TUNE}a_plan_from_a_file_is_the_candidate_itself", f"{TUNE}a_file_cannot_launch_what_is_no_candidate"),
      "another plan than the one that was timed"),
    M("written without the lock", "tuning/cache.py", "if not held:", "if held is None:",
      (f"{CACHE}nobody_writes_without_the_lock",), "another's entries are lost"),
    M("a lock for many", "tuning/cache.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
      (f"{CACHE}a_lock_is_exclusive_and_ends_with_its_process",), "another's entries are lost"),
    M("others' entries replaced", "tuning/cache.py", "{**self._read(), **entries}", "{**entries}",
      (f"{CACHE}an_update_keeps_other_entries_and_replaces_its_own",), "another's entries are lost"),
    M("deep files", "tuning/cache.py", "if _nested(data) > LEVELS:", "if _nested(data) < 0:",
      (f"{CACHE}a_bad_file_is_a_miss_with_one_warning_and_is_replaced",), "whoever walks it runs out of stack"),
    M("files of other kernels", "tuning/cache.py",
      "if self.fingerprint not in (None, document.fingerprint):", "if document.fingerprint is None:",
      (f"{TUNE}a_changed_kernel_never_meets_an_old_plan",), "times of kernels that are no more"),

    # Recompute.
    M("no check of versions", "recompute.py", "if tensor._version != version:", "if tensor._version < version:",
      (f"{RECOMPUTE}what_is_changed_in_place_after_it_was_saved_is_pytorchs_error",), "gradients of changed values"),
    M("sources may change", "recompute.py",
      "_require_version(source, version, source.size())", "_require_version(source, source._version, source.size())",
      (f"{RECOMPUTE}a_source_that_was_changed_is_an_error_where_nobody_else_asks_for_it",),
      "outputs of changed values"),
    M("changed before it was saved", "recompute.py", "or entry.version != saved.version", "or entry.version < 0",
      (f"{RECOMPUTE}an_output_changed_in_place_before_it_was_saved_is_kept",), "the values before the change"),
    M("parameters shared with a recipe", "recompute.py", "parameter.detach().clone()", "parameter.detach()",
      (f"{RECOMPUTE}a_recipe_owns_what_it_needs_of_size_c",), "outputs by the next step's weights"),
    M("inside others' hooks", "recompute.py", "and _innermost() is None", "",
      (f"{RECOMPUTE}other_hooks_win_inside_and_outside",), "a checkpoint keeps what it should not"),
    M("a record that never forgets", "recompute.py", "if len(self._entries) > self._sweep_at:",
      "if self._sweep_at < 0:",
      (f"{RECOMPUTE}a_long_record_forgets_what_is_gone",), "memory"),
    M("another stream's memory", "recompute.py", "if here != self.stream:", "if here is self:",
      (f"{RECOMPUTE}memory_of_another_stream_is_recorded_on_the_one_that_reads_it",),
      "memory is given away while it is read"),

    # Conversion: what is asked at each call.
    M("hooks of a layer unseen", "conversion/fuse.py",
      'own["_forward_hooks"]\n        or own["_forward_pre_hooks"]', 'own["_forward_pre_hooks"]',
      (f"{CONVERT}what_somebody_looks_at_stays",), "a hook is never called"),
    M("a forward on the instance unseen", "conversion/fuse.py", 'or "forward" in own\n', "\n",
      (f"{SURGERY}a_changed_model_is_the_changed_stock_model[fused-forward_swapped]",),
      "what somebody put there is never called"),
    M("global hooks unseen", "conversion/fuse.py",
      "if could_compute(*arguments, *options.values()) and not _has_any_global_hook():",
      "if could_compute(*arguments, *options.values()):",
      (f"{SURGERY}mkldnn_and_global_hooks",), "a hook is never called"),
    M("options of an activation as they were", "conversion/fuse.py",
      "{option: getattr(callee, option) for option in _OPTIONS[name]}", "{}",
      (f"{CONVERT}every_activation_of_a_sequence_is_fused[ELU(alpha=0.5)-elu(0.5)]",),
      "another slope than the module's"),
    M("options without a name", "conversion/fuse.py",
      "if len(arguments) > len(names) or not options.keys() <= set(names):", "if names is None:",
      (f"{SURGERY}an_activation_with_an_option_that_is_not_named_is_not_fused",), "softplus(beta=2) as beta=1"),
    M("modules with options without a name", "conversion/fuse.py",
      "if options(cls) <= {*_OPTIONS[name]}", "if options(cls) is not None",
      (f"{SURGERY}an_activation_with_an_option_that_is_not_named_is_not_fused",), "Softplus(2) as Softplus(1)"),
    M("nobody asks who computes", "conversion/fuse.py",
      'return route(argument, batch_statistics=True) != "torch" or recording() is not None', "return True",
      (f"{SURGERY}exported_traced_and_compiled_evaluation_are_stock",), "a trace holds what kernels need"),
    M("a residual of another dtype fused", "conversion/fuse.py", "and residual.dtype == x.input.dtype\n", "\n",
      (f"{CONVERT}an_add_keeps_what_broadcasting_and_promotion_do",), "+ promotes"),
    M("a method put in its place since", "conversion/fuse.py",
      "return (body if plain is original else plain)(self,", "return body(self,",
      (f"{SURGERY}a_forward_that_is_replaced_on_the_class_runs",), "it is never called"),
]
# fmt: on


if __name__ == "__main__":
    sys.exit(main())
