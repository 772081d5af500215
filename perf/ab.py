"""A/B comparisons: the questions about plans that only a GPU answers, each on the shapes that decide it.

A question is a list of cases and of providers, ours under one choice each. They pass the gate, are
timed in turn and leave rows as in the benchmark, under the question's name: ``python -m perf ab``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial

from perf.cases import Case
from perf.providers import PROVIDERS, Choice, Provider, Unsupported, of_driver, ours, planned
from triton_bn.plan import Device, Plan, Tile, candidates
from triton_bn.problem import Problem

__all__ = ["QUESTIONS", "Question", "with_stages"]


@dataclass(frozen=True)
class Question:
    """``why`` says what hangs on the answer."""

    name: str
    why: str
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]


# ---- Choices -------------------------------------------------------------------------------------


def each_tile(plan: Plan, change: Callable[[Tile], Tile]) -> Plan:
    return replace(
        plan, transform=change(plan.transform), reduce=plan.reduce and change(plan.reduce)
    )


def with_stages(stages: int, problem: Problem, device: Device, plan: Plan) -> Plan:
    """The plan with so many chunks of a loop in flight; split's where a resident one has no such loop."""
    if "stages" not in {field.name for field in fields(Tile)}:
        raise Unsupported("tiles have no stages")
    if plan.driver == "resident":
        plan = first(problem, device, lambda other: other.driver == "split")
    return each_tile(plan, lambda tile: replace(tile, stages=stages))


def of_depth(depth: int, problem: Problem, device: Device, plan: Plan) -> Plan:
    """The split plan with so many tiles in flight and the usual warps."""
    warps = plan.transform.warps
    return first(
        problem,
        device,
        lambda other: (
            other.driver == "split"
            and (other.transform.depth, other.transform.warps) == (depth, warps)
        ),
    )


def of_warps(warps: int, problem: Problem, device: Device, plan: Plan) -> Plan:
    """The split plan of so many warps, the usual depth and the most programs that are near it."""
    wanted = plan.transform.splits * plan.transform.warps // warps
    found = [
        other
        for other in candidates(problem, device)
        if other.driver == "split"
        and (other.transform.warps, other.transform.depth) == (warps, plan.transform.depth)
    ]
    if not found:
        raise Unsupported(f"no split plan of {warps} warps")
    return min(found, key=lambda other: abs(other.transform.splits - wanted))


def first(problem: Problem, device: Device, fits: Callable[[Plan], bool]) -> Plan:
    for plan in candidates(problem, device):
        if fits(plan):
            return plan
    raise Unsupported("no such plan")


def under(name: str, choice: Choice) -> Provider:
    """Ours, every problem under the plan of a choice."""
    return Provider(name, ours, inside=partial(planned, cache(choice)))


# ---- Questions -----------------------------------------------------------------------------------

#: ResNet-50's, from many values a channel to few; the batches that they are asked about.
SHAPES = ((64, 112, 112), (256, 56, 56), (128, 28, 28), (1024, 14, 14), (2048, 7, 7))


def cases(
    question: str,
    shapes: Sequence[tuple[int, ...]],
    batches: Sequence[int],
    layouts: Sequence[str],
    ops: Sequence[str] = ("bn+relu",),
    measures: tuple[str, ...] = ("forward", "backward"),
) -> tuple[Case, ...]:
    def every() -> Iterator[Case]:
        for batch in batches:
            for shape in shapes:
                for layout in layouts:
                    for op in ops:
                        yield Case(
                            "ResNet-50", (batch, *shape), layout, "bfloat16", op, measures,
                            question=question,
                        )  # fmt: skip

    return tuple(every())


def provider(name: str) -> Provider:
    return next(each for each in PROVIDERS if each.name == name)


def questions() -> Iterator[Question]:
    last, dense = "channels_last", "contiguous"
    drivers = {
        name: under(name, partial(of_driver, name)) for name in ("resident", "split", "streamed")
    }
    stages = tuple(under(f"{n} stage" + "s" * (n > 1), partial(with_stages, n)) for n in (1, 2))
    yield Question(
        "stages",
        "whether the loads of a chunk under way during the chunk before pay for one more barrier",
        cases("stages", SHAPES, (32, 256), (last,)) + cases("stages", SHAPES[:3], (256,), (dense,)),
        stages,
    )
    compiled = provider("torch.compile")
    yield Question(
        "resident backward",
        "whether 254 registers and one program a processor are worth reading once",
        cases(
            "resident backward",
            ((1024, 14, 14),),
            (32,),
            (dense,),
            ("bn", "bn+relu"),
            ("backward",),
        ),
        (drivers["resident"], drivers["split"], compiled),
    )
    yield Question(
        "resident with a residual",
        "whether the residual's loads wait behind stores",
        cases(
            "resident with a residual",
            ((1024, 14, 14), (2048, 7, 7)),
            (32,),
            (dense,),
            ("bn+add+relu",),
        ),
        (drivers["resident"], drivers["split"], compiled),
    )
    yield Question(
        "streamed",
        "whether reading twice from L2 beats two launches, and where the heuristic may pick it",
        cases(
            "streamed", ((256, 56, 56), (64, 112, 112), (512, 28, 28)), (256,), (dense,), ("bn",)
        ),
        (drivers["split"], drivers["streamed"]),
    )
    yield Question(
        "waves",
        "whether a fifth of a wave is wasted at a depth of 2",
        cases("waves", ((256, 14, 14), (512, 14, 14)), (256,), (dense,), measures=("backward",)),
        tuple(under(f"depth {n}", partial(of_depth, n)) for n in (1, 2, 4)),
    )
    yield Question(
        "warps",
        "whether channels_last wants twice the programs of half the warps",
        cases("warps", ((256, 56, 56), (512, 28, 28), (1024, 14, 14)), (256,), (last,)),
        tuple(under(f"{n} warps", partial(of_warps, n)) for n in (4, 8)),
    )


QUESTIONS = tuple(questions())
