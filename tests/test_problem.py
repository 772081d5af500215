"""The canonical view of an input, the problem it makes, activations as data, and what passes the boundary."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError
from itertools import pairwise, permutations, product

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import given
from torch import Tensor

from triton_bn.problem import (
    ACTIVATIONS,
    Activation,
    Problem,
    aligned_like,
    canonical,
    check,
    describe,
)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def view(x: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    return canonical(tuple(x.shape), x.stride())


@pytest.mark.parametrize(
    ("x", "sizes"),
    [
        (torch.empty(6, 5), (6, 5, 1)),
        (torch.empty(6, 5, 4), (6, 5, 4)),
        (torch.empty(6, 5, 4, 3), (6, 5, 12)),
        (torch.empty(6, 5, 4, 3, 2), (6, 5, 24)),
        (torch.empty(6, 5, 4, 3).to(memory_format=torch.channels_last), (72, 5, 1)),
        (torch.empty(6, 5, 4, 3, 2).to(memory_format=torch.channels_last_3d), (144, 5, 1)),
        (torch.empty(5, 6, 4, 3).transpose(0, 1), (1, 5, 72)),
        (torch.empty(5, 6).t(), (1, 5, 6)),
        (torch.empty(4, 6, 5, 3).permute(1, 2, 0, 3), (24, 5, 3)),
    ],
    ids=[
        "(N, C)", "(N, C, L)", "NCHW", "NCDHW", "channels_last", "channels_last_3d", "transposed",
        "transposed matrix", "channels between spaces",
    ],
)  # fmt: skip
def test_a_dense_tensor_is_one_block(x: Tensor, sizes: tuple[int, int, int]) -> None:
    _, channels, inner = sizes
    assert view(x) == (sizes, (channels * inner, inner, 1))


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_every_order_of_dimensions_is_one_dense_block(rank: int) -> None:
    for order in permutations(range(rank)):
        x = torch.empty([2, 3, 4, 5, 6][:rank]).permute(order)
        found = view(x)
        assert found is not None, order
        (outer, channels, inner), strides = found
        assert channels == x.shape[1]
        assert outer * channels * inner == x.numel()
        assert strides == (channels * inner, inner, 1)


@st.composite
def numbered(draw: st.DrawFn) -> Tensor:
    """A tensor of any strides over a storage in which each value is its own place."""
    rank = draw(st.integers(2, 5))
    shape = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    order = draw(st.permutations(range(rank)))
    sizes, steps, before = list(shape), [1] * rank, [0] * rank
    for d in range(rank):
        steps[d] = draw(st.sampled_from([1, 1, 1, 2, 3]))
        before[d] = draw(st.sampled_from([0, 0, 0, 1, 2]))
        sizes[d] = before[d] + shape[d] * steps[d] + draw(st.sampled_from([0, 0, 0, 1]))
    offset = draw(st.integers(0, 3))
    storage = torch.arange(offset + math.prod(sizes), dtype=torch.float64)
    block = (
        storage[offset:]
        .view([sizes[d] for d in order])
        .permute([order.index(d) for d in range(rank)])
    )
    x = block[tuple(slice(b, b + n * s, s) for b, n, s in zip(before, shape, steps, strict=True))]
    expanded = draw(
        st.none() | st.sampled_from([d for d in range(rank) if shape[d] == 1] or [None])
    )
    if expanded is not None:
        shape[expanded] = draw(st.integers(2, 4))
        x = x.expand(shape)
    return x


def block(x: Tensor, found: tuple[tuple[int, int, int], tuple[int, int, int]]) -> Tensor:
    return x.as_strided(*found, x.storage_offset())


@given(x=numbered())
def test_the_view_holds_exactly_the_values_of_each_channel(x: Tensor) -> None:
    found = view(x)
    if found is None:
        return
    values = block(x, found)
    for c in range(x.shape[1]):
        assert sorted(values[:, c].flatten().tolist()) == sorted(x[:, c].flatten().tolist())


@given(x=numbered())
def test_there_is_a_view_wherever_outer_and_inner_values_are_evenly_spaced(x: Tensor) -> None:
    def even(dims: list[int]) -> bool:
        places = [0]
        for d in dims:
            places = [place + i * x.stride(d) for place in places for i in range(x.shape[d])]
        places.sort()
        steps = {b - a for a, b in pairwise(places)}
        return len(steps) <= 1 and 0 not in steps

    dims = [d for d in range(x.dim()) if d != 1 and x.shape[d] > 1]
    outer = [d for d in dims if x.shape[1] > 1 and x.stride(d) > x.stride(1)]
    distinct = x.shape[1] == 1 or x.stride(1) > 0
    possible = distinct and even(outer) and even([d for d in dims if d not in outer])
    assert (view(x) is not None) == possible


@given(x=numbered())
def test_a_problem_reads_x_in_the_order_in_which_its_outputs_lie(x: Tensor) -> None:
    problem, seen = describe(x, training=True)
    assert torch.equal(seen, x)
    assert problem.sizes[1] == x.shape[1]
    assert problem.count * x.shape[1] == problem.numel == x.numel()
    output = torch.empty_like(seen).copy_(seen)
    dense = (problem.row, problem.inner, 1)
    read = block(seen, (problem.sizes, problem.strides))
    assert torch.equal(read, output.as_strided(problem.sizes, dense))
    assert problem.dense == (problem.strides == dense)
    strides = zip(x.shape, output.stride(), torch.empty_like(x).stride(), strict=True)
    assert all(size == 1 or mine == theirs for size, mine, theirs in strides), (
        "another layout than x"
    )


def test_windows_that_overlap_are_read_as_their_outputs_lie() -> None:
    """Their strides alone would allow another order than that of torch.empty_like(x)."""
    for x in (torch.arange(9.0).unfold(0, 4, 1), torch.arange(9.0).as_strided((4, 3), (1, 1))):
        problem, seen = describe(x, training=True)
        assert torch.equal(seen, x)
        output = torch.empty_like(x).copy_(x)
        read = block(seen, (problem.sizes, problem.strides))
        assert torch.equal(read, output.as_strided(problem.sizes, (problem.row, problem.inner, 1)))


@given(x=numbered())
def test_what_is_read_in_one_access_is_adjacent_and_aligned(x: Tensor) -> None:
    for dtype in FLOATING:
        storage = torch.empty(x.untyped_storage().nbytes() // 8, dtype=dtype)
        typed = storage.as_strided(x.shape, x.stride(), x.storage_offset())
        problem, seen = describe(typed, training=True)
        width = problem.vector * dtype.itemsize
        assert width <= 16
        assert problem.vector & (problem.vector - 1) == 0
        rows = range(problem.outer)
        assert all(
            (seen.data_ptr() + n * problem.strides[0] * dtype.itemsize) % width == 0 for n in rows
        )
        assert all(n * problem.row % problem.vector == 0 for n in rows)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_a_dense_image_is_read_in_whole_16_byte_accesses(dtype: torch.dtype) -> None:
    x = torch.empty(4, 16, 8, 8, dtype=dtype)
    for image in (x, x.to(memory_format=torch.channels_last)):
        problem, seen = describe(image, training=True)
        assert problem.vector * dtype.itemsize == 16
        assert seen is image


@pytest.mark.parametrize(
    "layout",
    [
        "contiguous",
        "channels_last",
        "transposed",
        "reversed",
        "sliced_channels",
        "sliced_channels_last",
        "strided_batch",
        "strided_channels",
        "misaligned",
    ],
)
def test_an_input_with_a_view_is_not_copied(layout: str) -> None:
    x = oracle.arrange(torch.randn(4, 6, 5, 3), layout)
    _, seen = describe(x, training=True)
    assert seen is x


@pytest.mark.parametrize(
    "layout", ["cropped", "expanded_batch", "expanded_space", "expanded_channels"]
)
def test_an_input_without_a_view_has_none(layout: str) -> None:
    assert view(oracle.arrange(torch.randn(4, 6, 5, 3), layout)) is None


def test_64_bit_offsets_are_taken_exactly_where_32_bits_would_not_do() -> None:
    def problem(
        sizes: tuple[int, int, int], strides: tuple[int, int, int] | None = None
    ) -> Problem:
        return Problem(
            "forward", *sizes, strides or (sizes[1] * sizes[2], sizes[2], 1), torch.float16
        )

    assert not problem((256, 256, 56 * 56)).wide
    assert not problem((1, 1, 2**30)).wide
    assert problem((1, 1, 2**31)).wide
    assert problem((1, 1, 2**31 - 2**20)).wide  # a tile may reach past it before its mask
    assert problem((2**16, 2**15, 1)).wide
    assert problem((3, 2**30, 1)).wide
    # Few values, far apart; and a stride that is never taken.
    assert problem((2, 4, 8), (2**31, 8, 1)).wide
    assert not problem((1, 4, 8), (2**31, 8, 1)).wide


def test_a_problem_is_a_key() -> None:
    """Equal ones are one key, pickled ones too; a difference tells them apart."""
    x = torch.empty(4, 6, 5)
    problem, _ = describe(x, training=True, activation=Activation("relu"))
    again, _ = describe(x, training=True, activation=Activation("relu"))
    assert problem == again
    assert hash(problem) == hash(again)
    assert hash(pickle.loads(pickle.dumps(problem))) == hash(problem)
    others = [
        describe(x, training=False, activation=Activation("relu"))[0],
        describe(x, training=True)[0],
        describe(x, training=True, activation=Activation("relu"), residual=True)[0],
        describe(x, training=True, activation=Activation("relu"), cumulative=True)[0],
        describe(x.half(), training=True, activation=Activation("relu"))[0],
        describe(x.transpose(1, 2), training=True, activation=Activation("relu"))[0],
    ]
    assert len({problem, *others}) == 7
    assert len({str(p) for p in (problem, *others)}) == 7


def test_a_tensor_is_copied_only_to_change_its_layout_or_alignment() -> None:
    dense = torch.empty(4, 8, 6, 3)
    same = torch.randn(4, 8, 6, 3)
    assert aligned_like(same, dense) is same
    vector = torch.randn(1, 8, 1, 1)
    odd = vector.as_strided(vector.shape, (99, 1, 7, 5))
    assert aligned_like(odd, torch.empty(1, 8, 1, 1)) is odd
    for layout in ("channels_last", "misaligned", "cropped", "expanded_batch"):
        other = oracle.arrange(same, layout)
        copy = aligned_like(other, dense)
        assert copy.stride() == dense.stride()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, other)


# Activations.


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_name_means_the_activation_with_pytorchs_defaults(name: str) -> None:
    activation = Activation.of(name)
    assert activation == Activation(name)
    assert Activation.of(activation) is activation
    assert activation.name == name
    assert activation.parameter == {"leaky_relu": 0.01, "elu": 1.0}.get(name)
    assert str(activation).startswith(name)
    assert pickle.loads(pickle.dumps(activation)) == activation


def test_none_is_no_activation() -> None:
    assert Activation.of(None) is None


def test_a_parameter_is_part_of_the_activation() -> None:
    assert Activation("leaky_relu", 0.2).parameter == 0.2
    assert Activation("elu", 2).parameter == 2.0
    assert isinstance(Activation("elu", 2).parameter, float)
    assert Activation("leaky_relu", 0.2) != Activation("leaky_relu")
    assert Activation("leaky_relu", 0.01) == Activation("leaky_relu")
    assert hash(Activation("leaky_relu", 0.01)) == hash(Activation("leaky_relu"))
    assert str(Activation("leaky_relu", 0.2)) == "leaky_relu(0.2)"


def test_an_activation_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Activation("relu").name = "gelu"


def test_an_unknown_activation_lists_those_that_are_known() -> None:
    with pytest.raises(ValueError) as error:
        Activation("softplus")
    assert all(repr(name) in str(error.value) for name in (*ACTIVATIONS, "softplus"))


@pytest.mark.parametrize("name", [name for name, default in ACTIVATIONS.items() if default is None])
def test_a_parameter_that_an_activation_does_not_take_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' takes no parameter, but got 0.5"):
        Activation(name, 0.5)


@pytest.mark.parametrize(
    "activation",
    [*ACTIVATIONS, Activation("leaky_relu", 0.3), Activation("leaky_relu", 1.0)],
    ids=str,
)
def test_one_bit_a_value_is_enough_exactly_where_there_are_two_slopes(
    activation: str | Activation,
) -> None:
    activation = Activation.of(activation)
    slopes = oracle.slope(torch.linspace(-8, 8, 1001, dtype=torch.float64), activation).unique()
    assert activation.two_slopes == (len(slopes) <= 2)


# The boundary. What is refused, and in which words, is tested where PyTorch can be asked: test_functional.py.


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_combination_that_pytorch_takes_passes(dtype: torch.dtype, training: bool) -> None:
    for parameters, present in product(
        {dtype, torch.float32 if dtype.itemsize == 2 else dtype}, range(8)
    ):
        mean, var, weight, bias = (torch.ones(3, dtype=parameters) for _ in range(4))
        if not training and not present & 4:
            continue
        check(
            torch.ones(2, 3, 4, dtype=dtype),
            mean if present & 4 else None,
            var if present & 4 else None,
            weight if present & 1 else None,
            bias if present & 2 else None,
            training,
            1e-5,
        )


def test_eps_may_be_zero_in_eval() -> None:
    check(torch.ones(2, 3), torch.zeros(3), torch.ones(3), None, None, False, 0.0)


def test_an_input_without_values_passes_whatever_stands_beside_it() -> None:
    """F.batch_norm looks at nothing else then."""
    check(torch.ones(0), None, None, None, None, True, 1e-5)
    check(torch.ones(0, 3), None, None, torch.ones(2), None, False, 1e-5)
