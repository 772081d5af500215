"""``recompute()``: the same gradients bit for bit, outputs that are not kept, and never a wrong number."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import Path
from packages import torchvision
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import triton_bn
from perf.commands import memory
from triton_bn import recompute, route, verbs
from triton_bn.modules import _Fused
from triton_bn.problem import ACTIVATIONS
from triton_bn.recompute import Recipe, recording

path = oracle.path


@pytest.fixture(params=["torch", "kernels"])
def computer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: PyTorch's own operators, as on a CPU, or the kernels."""
    if request.param == "torch":
        monkeypatch.setattr(route, "on_gpu", lambda x: False)
    return str(request.param)


def times(computer: str) -> int:
    """How often an output behind an activation is made: PyTorch's keep it, or what it is of, and ask later."""
    return 2 if computer == "torch" else 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that have been followed, one entry each time."""
    followed: list[Any] = []
    usual = Recipe._make

    def make(recipe: Any, here: Any) -> Any:
        followed.append(recipe)
        return usual(recipe, here)

    monkeypatch.setattr(Recipe, "_make", make)
    return followed


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Net(nn.Module):
    """conv → layer → conv → layer(residual) → conv → pooling → linear, of which each saves what it takes."""

    def __init__(self, activation: str | None = "relu", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, padding=1)
        self.bn1, self.bn2 = (
            triton_bn.BatchNorm2d(6, activation=activation, **options) for _ in range(2)
        )
        self.conv3, self.linear = nn.Conv2d(6, 4, 1), nn.Linear(4 * 2 * 2, 3)
        for parameter in (self.bn1.weight, self.bn1.bias, self.bn2.weight, self.bn2.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, 0.5, 1.5)
        #: Whose storage is still there.
        self.outputs: list[StorageWeakRef] = []

    def compute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.bn1(self.conv1(x))
        z = self.bn2(self.conv2(y), y)
        return y, z, self.linear(F.adaptive_avg_pool2d(self.conv3(z), 2).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        *outputs, result = self.compute(x)
        self.outputs = [StorageWeakRef(t.untyped_storage()) for t in outputs]
        return result

    @property
    def kept(self) -> list[bool]:
        """Which outputs of the two layers are in memory."""
        return [not output.expired() for output in self.outputs]


def step(net: nn.Module, x: Tensor, inside: bool) -> list[Tensor]:
    """Gradients and statistics after one step of a copy of the network."""
    net = copy.deepcopy(net)
    x = x.clone().requires_grad_()
    with recompute() if inside else nullcontext():
        loss = net(x).float().square().mean()
    loss.backward()
    found = [p.grad for p in net.parameters()] + [x.grad]
    return [t for t in found if t is not None] + [b.clone() for b in net.buffers()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# Bit for bit.


@pytest.mark.parametrize(
    ("activation", "dtype", "memory_format", "training"),
    [
        ("relu", torch.float32, torch.contiguous_format, True),
        ("relu", torch.bfloat16, torch.channels_last, True),
        ("relu", torch.float32, torch.channels_last, False),
        ("relu6", torch.float16, torch.contiguous_format, True),
        ("silu", torch.float64, torch.contiguous_format, True),
        ("silu", torch.bfloat16, torch.channels_last, False),
        ("hardswish", torch.float32, torch.channels_last, True),
        ("gelu", torch.float32, torch.contiguous_format, True),
        (None, torch.bfloat16, torch.contiguous_format, True),
        (None, torch.float64, torch.channels_last, False),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_gradients_are_bitwise_those_without(
    computer: str,
    made: list[Any],
    activation: str | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    training: bool,
) -> None:
    net = Net(activation).to(dtype=dtype, memory_format=memory_format).train(training)  # type: ignore[call-overload]
    x = randn(5, 3, 7, 7, dtype=dtype).to(memory_format=memory_format)
    assert same(step(net, x, True), step(net, x, False))
    assert made


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=str,
)  # fmt: skip
def test_layers_without_this_or_that(computer: str, made: list[Any], options: Any) -> None:
    net, x = Net("silu", **options), randn(5, 3, 7, 7)
    assert same(step(net, x, True), step(net, x, False))
    assert made


@pytest.mark.parametrize("layout", ["transposed", "sliced_channels", "cropped", "expanded_batch"])
def test_inputs_in_any_layout(computer: str, made: list[Any], layout: str) -> None:
    results = []
    for inside in (False, True):
        layer = triton_bn.BatchNorm1d(6, activation="silu")
        x = oracle.arrange(randn(4, 6, 5), layout).requires_grad_()
        with recompute() if inside else nullcontext():
            z = layer(x).pow(3)
        z.sum().backward()
        results.append([x.grad, layer.weight.grad, layer.bias.grad])
    assert made
    assert same(*results)


def again_by(path: Path, x: Tensor, activation: str | None, residual: Tensor | None) -> None:
    """y of a training forward, and of the transform by its statistics."""
    act = triton_bn.Activation.of(activation)
    weight, bias = randn(x.shape[1], seed=1), randn(x.shape[1], seed=2)
    y, stats, _ = verbs.forward(
        x, weight, bias, None, None, None, residual, 0.1, 1e-5, act, bits=False
    )
    kept = stats.clone()
    assert torch.equal(verbs.again(x, residual, None, stats, weight, bias, act), y)
    assert torch.equal(stats, kept)


@pytest.mark.parametrize("driver", ["resident", "split", "streamed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels"])
def test_the_transform_by_kept_statistics_gives_every_drivers_output(
    path: Path, driver: str, layout: str
) -> None:
    path.driver = driver
    activations = [None, *ACTIVATIONS]
    for i, activation in enumerate(activations):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        x = oracle.arrange(randn(5, 7, 3, 5, dtype=dtype), layout) + 3
        residual = randn(5, 7, 3, 5, seed=3, dtype=dtype) if i % 2 else None
        again_by(path, x, activation, residual)
    if path.name == "kernels":
        assert {"normalize_kernel"} < set(path.launches)


# What is kept.


def test_outputs_are_freed_and_made_once_for_all_who_ask(computer: str, made: list[Any]) -> None:
    net = Net()
    with recompute():
        loss = net(randn(5, 3, 7, 7)).square().mean()
    gc.collect()
    # The second is made of the first, which is a recomputed value: that would be a chain.
    assert net.kept == [False, True]
    loss.backward()
    assert len(made) == times(computer)
    assert all(recipe._made.expired() for recipe in made)

    layer = triton_bn.BatchNorm1d(4)
    made.clear()
    with recompute():
        y = layer(randn(6, 4).requires_grad_())
        z = y * y.view(-1).view(6, 4)  # one node that keeps it twice
    z.sum().backward()
    assert len(made) == 1


def test_an_output_that_nobody_else_keeps_is_not_made_again(computer: str, made: list[Any]) -> None:
    """Without a gradient to take sums for, a layer does not keep its input either."""
    layer, conv = triton_bn.BatchNorm2d(3).requires_grad_(False), nn.Conv2d(3, 2, 1)
    with recompute():
        y = layer(randn(4, 3, 5, 5))
        conv(y).sum().backward()
    assert not made
    assert y is not None


def test_residuals_that_are_kept_anyway_let_the_output_be_made_again(
    computer: str, made: list[Any]
) -> None:
    """A chain of blocks: every other output is kept."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), triton_bn.BatchNorm2d(4, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x), x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(5)), nn.Conv2d(4, 2, 1))
    outputs: list[StorageWeakRef] = []
    x = randn(3, 4, 5, 5)
    expected = step(net, x, False)
    for block in list(net)[:-1]:
        block.register_forward_hook(
            lambda m, args, y: outputs.append(StorageWeakRef(y.untyped_storage()))
        )
    y: Any
    with recompute():
        y = net(x.requires_grad_()).float().square().mean()
    gc.collect()
    assert [output.expired() for output in outputs] == [True, False, True, False, True]
    y.backward()
    assert len(made) == 2 * 3  # the layer itself asks for its output as well, to tell the slopes
    assert same([p.grad for p in net.parameters()], expected[: len(list(net.parameters()))])  # type: ignore[misc]


def test_a_long_record_forgets_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "on_gpu", lambda x: False)
    layer, linear = triton_bn.BatchNorm1d(4, activation="relu"), nn.Linear(4, 4)
    with recompute():
        for i in range(300):
            x = randn(3, 4, seed=i).requires_grad_()
            linear(layer(x)).sum().backward()
        record = recording()
        assert record is not None
        assert len(record._entries) < 600


# Never a wrong number.


@pytest.mark.parametrize("when", ["plain", "recipe", "source", "parameter"])
def test_what_is_changed_in_place_after_it_was_saved_is_pytorchs_error(
    computer: str, when: str
) -> None:
    layer, linear = triton_bn.BatchNorm1d(4, activation="silu"), nn.Linear(4, 3)
    with recompute():
        x = randn(6, 4).requires_grad_() * 2
        y = layer(x)
        z = linear(y).sin() if when != "plain" else (y * 2).sin()
        kept = z.exp()
    changed = {"plain": kept, "recipe": y, "source": x, "parameter": linear.weight}[when]
    with torch.no_grad():
        changed.zero_()
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: .* at version [12]; exp"
    ):
        kept.sum().backward()


def test_a_source_that_was_changed_is_an_error_where_nobody_else_asks_for_it(computer: str) -> None:
    """Only the gradient of what stands behind the layer is wanted: the layer's own backward never runs."""
    layer, linear = triton_bn.BatchNorm1d(4, activation="silu"), nn.Linear(4, 3)
    with recompute():
        x = randn(6, 4).requires_grad_() * 2
        z = linear(layer(x))
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), linear.weight)


def test_an_output_changed_in_place_before_it_was_saved_is_kept(
    computer: str, made: list[Any]
) -> None:
    results = []
    for inside in (False, True):
        layer, linear = triton_bn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)
        nn.init.constant_(linear.weight, 0.5)
        x = randn(6, 4).requires_grad_()
        with recompute() if inside else nullcontext():
            y = layer(x)
            y += x
            z = linear(F.relu(y, inplace=True))
        z.square().sum().backward()
        results.append([x.grad, layer.weight.grad, linear.weight.grad])
    assert same(*results)
    assert not made


def test_a_plan_that_is_given_is_not_asked_to_make_an_output_again(made: list[Any]) -> None:
    layer, x = triton_bn.BatchNorm1d(4, activation="relu"), randn(6, 4).requires_grad_()
    with triton_bn.use(layer.plan(x)):
        with triton_bn.recompute():
            y = layer(x).pow(3)
        y.sum().backward()
    assert made


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_recipe_owns_what_it_needs_of_size_c(
    computer: str, made: list[Any], training: bool
) -> None:
    """Parameters may be gone by then, and statistics may have moved on."""
    found = []
    for gone in (False, True):
        torch.manual_seed(0)
        layer = triton_bn.BatchNorm2d(3, activation="silu").train(training)
        conv = nn.Conv2d(3, 2, 1)
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, 0.5, 1.5)
        with triton_bn.recompute():
            loss = conv(layer(randn(4, 3, 5, 5).requires_grad_())).square().sum()
        if gone:
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.data.zero_()
        found += torch.autograd.grad(loss, conv.weight)
    assert made
    assert torch.equal(*found)


# Together with others.


@pytest.mark.parametrize(
    "hooks", [lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t), save_on_cpu],
    ids=["hooks", "save_on_cpu"],
)  # fmt: skip
def test_other_hooks_win_inside_and_outside(
    computer: str, made: list[Any], hooks: Callable[[], AbstractContextManager[Any]]
) -> None:
    net, x = Net(), randn(5, 3, 7, 7)
    for outer, inner in ((hooks, recompute), (recompute, hooks)):
        with outer(), inner():
            assert recording() is None
            net(x).sum().backward()
    assert not made


def test_nested_it_is_one(computer: str, made: list[Any]) -> None:
    net = Net()
    with recompute():
        record = recording()
        with recompute():
            assert recording() is record
            y = net.bn1(net.conv1(randn(5, 3, 7, 7)))
        z = net.conv2(y)
    assert recording() is None
    z.sum().backward()
    assert len(made) == times(computer)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_checkpoints(computer: str, made: list[Any], reentrant: bool, outside: bool) -> None:
    """A checkpoint inside keeps its own way; one outside sees nothing of ours; statistics advance as stock's."""

    def run(inside: bool) -> list[Tensor]:
        torch.manual_seed(1)
        first, last = (
            nn.Sequential(
                nn.Conv2d(3, 3, 1), triton_bn.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 3, 1)
            )
            for _ in range(2)
        )
        x = randn(4, 3, 5, 5).requires_grad_()
        where = triton_bn.recompute if inside else nullcontext

        def forward(x: Tensor) -> Tensor:
            with where() if outside else nullcontext():
                return last(first(x))  # type: ignore[no-any-return]

        if outside:
            y = checkpoint(forward, x, use_reentrant=reentrant)
        else:
            with where():
                y = last(checkpoint(first, x, use_reentrant=reentrant))
        y.square().sum().backward()
        models = nn.ModuleList([first, last])
        return [p.grad for p in models.parameters()] + [x.grad, *models.buffers()]  # type: ignore[list-item,return-value]

    assert same(run(True), run(False))
    # A reentrant checkpoint runs its forward anew outside of the context; its hooks were never asked.
    expected = 0 if outside and not reentrant else 2 if outside else 1
    assert len(made) == expected * times(computer)


def test_torch_func_in_the_models_own_forward(computer: str) -> None:
    """Hooks are disabled there."""
    layer = triton_bn.BatchNorm1d(4, activation="silu").eval()

    def forward(x: Tensor) -> Tensor:
        with triton_bn.recompute():
            assert recording() is None
            return layer(x).square().sum()  # type: ignore[no-any-return]

    x = randn(6, 4)
    expected = x.clone().requires_grad_()
    forward_ = layer(expected).square().sum()
    forward_.backward()
    torch.testing.assert_close(torch.func.grad(forward)(x), expected.grad)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_compiled_it_does_nothing(computer: str, made: list[Any], inside: bool) -> None:
    net, x = Net(), randn(5, 3, 7, 7)

    def forward(x: Tensor) -> Tensor:
        if not inside:
            return net.compute(x)[-1]
        with triton_bn.recompute():
            return net.compute(x)[-1]

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    with nullcontext() if inside else triton_bn.recompute():
        loss = compiled(x).square().mean()
    loss.backward()
    assert not made
    expected = step(Net(), x, False)
    for p, e in zip(net.parameters(), expected, strict=False):
        torch.testing.assert_close(p.grad, e)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_exported_and_traced_it_leaves_no_mark() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.head = triton_bn.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with triton_bn.recompute():
                return self.head(self.bn(x))  # type: ignore[no-any-return]

    model, x = Model().eval(), randn(6, 4)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)  # type: ignore[no-untyped-call]


def test_another_thread_is_not_in_the_context(computer: str, made: list[Any]) -> None:
    net, x = Net(), randn(5, 3, 7, 7)
    found: list[Any] = []
    with triton_bn.recompute():
        thread = threading.Thread(
            target=lambda: found.append((recording(), net(x).sum().backward()))
        )
        thread.start()
        thread.join()
    assert found == [(None, None)]
    assert not made


def test_backward_in_another_thread_and_inside_the_context(computer: str, made: list[Any]) -> None:
    expected = step(Net(), randn(5, 3, 7, 7), False)
    for inside in (False, True):
        net = Net()
        with triton_bn.recompute():
            loss = net(randn(5, 3, 7, 7)).square().mean()
            if inside:
                loss.backward()
        if not inside:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        grads = [p.grad for p in net.parameters()]
        assert same(grads, expected[: len(grads)])  # type: ignore[arg-type]
    assert len(made) == 2 * times(computer)


# Backward in every way.


def test_backward_again_and_again(computer: str, made: list[Any]) -> None:
    """A retained graph, several backward passes, accumulated gradients, gradients of a part."""
    results = []
    for inside in (False, True):
        net = Net("silu")
        for seed in range(2):  # accumulated
            with triton_bn.recompute() if inside else nullcontext():
                loss = net(randn(5, 3, 7, 7, seed=seed)).square().mean()
            (part,) = torch.autograd.grad(loss, net.conv2.weight, retain_graph=True)
            loss.backward(retain_graph=True)
            loss.backward()
        results.append([part, *(p.grad for p in net.parameters())])
    assert same(*results)  # type: ignore[arg-type]
    assert len(made) > 4
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_double_backward(computer: str, made: list[Any]) -> None:
    results = []
    for inside in (False, True):
        net, x = Net("silu").double(), randn(5, 3, 7, 7, dtype=torch.float64).requires_grad_()
        with triton_bn.recompute() if inside else nullcontext():
            loss = net(x).square().mean()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        dx.square().sum().backward()
        results.append([dx.detach(), x.grad, *(p.grad for p in net.parameters())])
    assert made
    assert same(*results)  # type: ignore[arg-type]


def test_an_exception_in_between_changes_nothing(computer: str, made: list[Any]) -> None:
    net, x = Net(), randn(5, 3, 7, 7)
    expected = step(net, x, True)
    with pytest.raises(RuntimeError, match="channels"), triton_bn.recompute():
        net.conv1(net.bn1(net.conv1(x)))
    assert recording() is None
    net = Net()
    with triton_bn.recompute():
        loss = net(x).square().mean()

    def fail(gradient: Tensor) -> None:
        raise ZeroDivisionError

    hook = net.conv2.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    hook.remove()
    net.zero_grad()
    loss.backward()
    assert same([p.grad for p in net.parameters()], expected[: len(list(net.parameters()))])  # type: ignore[misc]


def test_autocast(computer: str, made: list[Any]) -> None:
    """Convolutions and the layers behind them in bfloat16."""
    results = []
    for inside in (False, True):
        net = Net()
        with triton_bn.recompute() if inside else nullcontext(), torch.autocast("cpu"):
            loss = net(randn(5, 3, 7, 7)).float().square().mean()
        loss.backward()
        results.append([p.grad for p in net.parameters()])
    assert same(*results)  # type: ignore[arg-type]
    assert len(made) == times(computer)


def test_memory_of_another_stream_is_recorded_on_the_one_that_reads_it(
    made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = ["forward"]
    recorded: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(sys.modules["triton_bn.recompute"], "_stream", lambda device: stream[0])
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, s: recorded.append((s, tuple(self.shape)))
    )
    layer = triton_bn.BatchNorm1d(4, activation="silu")
    with triton_bn.recompute():
        y = layer(randn(6, 4).requires_grad_())
        z, w = y.pow(3), y.exp() * y
    held = z.grad_fn._saved_self  # type: ignore[union-attr]
    assert not recorded
    assert z.grad_fn._saved_self.data_ptr() == held.data_ptr()  # type: ignore[union-attr]
    stream[0] = "backward"
    w.sum().backward()  # what the other stream has made may not be ready here
    assert len(made) == 2
    assert recorded == [("backward", shape) for shape in ((6, 4), (2, 4), (4,), (4,))]


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    """The default process group, of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), triton_bn.BatchNorm2d(6, activation="silu"),
                nn.Conv2d(6, 3, 1), triton_bn.BatchNorm2d(3, activation="silu"),
            )
            for _ in range(2)
        ),
        nn.Conv2d(3, 2, 1),
    )  # fmt: skip
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.2, 1.5)
    return net


@pytest.mark.dist
def test_two_blocks_under_fsdp(computer: str, made: list[Any], group: None) -> None:
    """When a convolution asks for its input, the layer before it has no parameters yet."""
    net, x = blocks(), randn(4, 3, 6, 6)
    expected = step(net, x, False)
    mesh = init_device_mesh("cpu", (1,))
    for block in (*net, net):
        fully_shard(block, mesh=mesh)
    for _ in range(
        2
    ):  # the second step's forward finds the state that the first step's backward left
        net.zero_grad()
        with triton_bn.recompute():
            loss = net(x).square().mean()
        loss.backward()
    grads = [p.grad.full_tensor() for p in net.parameters()]  # type: ignore[union-attr]
    assert same(grads, expected[: len(grads)])
    assert len(made) == 2 * 4 * times(computer)


@pytest.mark.dist
def test_ddp_and_module_hooks(computer: str, made: list[Any], group: None) -> None:
    net, x = blocks(), randn(4, 3, 6, 6)
    expected = step(net, x, False)
    seen: list[tuple[int, ...]] = []
    net[0][1].register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))  # type: ignore[union-attr]
    net[1].register_full_backward_hook(lambda m, dx, dy: seen.append(tuple(dy[0].shape)))
    wrapped = DistributedDataParallel(net)
    with triton_bn.recompute():
        loss = wrapped(x).square().mean()
    loss.backward()
    grads = [p.grad for p in net.parameters()]
    assert same(grads, expected[: len(grads)])  # type: ignore[arg-type]
    assert seen == [(4, 6, 6, 6), (4, 3, 6, 6)]
    assert len(made) == 4 * times(computer)


# Whole models.


class ResNet(nn.Module):
    """A stem, two blocks that add in place, and a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += x
            return self.relu(out)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(True)
        self.blocks = nn.Sequential(ResNet.Block(), ResNet.Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return self.head(self.blocks(x).mean((2, 3))) * scale  # type: ignore[no-any-return]


def converted(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return triton_bn.convert(ResNet() if model is None else model, recompute=True, **options)


def test_a_converted_model_enters_it_itself(computer: str, made: list[Any]) -> None:
    x = randn(4, 3, 8, 8)
    stock, plain, ours = (
        step(model, x, False) for model in (ResNet(), triton_bn.convert(ResNet()), converted())
    )
    assert same(ours, plain)
    assert made
    if computer == "torch":
        assert same(ours, stock)
    model = converted()
    loss = model(x)
    assert recording() is None
    loss.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        triton_bn.convert,
        lambda model: triton_bn.convert(model, fuse=False),
        lambda model: converted(model),
    ],
    ids=["copied", "pickled", "converted again", "without fusing", "asked again"],
)
def test_it_stays_with_the_model_until_it_is_reverted(
    computer: str, made: list[Any], change: Callable[[nn.Module], nn.Module]
) -> None:
    x = randn(4, 3, 8, 8)
    expected = step(converted(), x, False)
    made.clear()
    model = change(converted())
    assert type(model).__name__ == "ResNet"
    assert inspect.signature(model.forward) == inspect.signature(ResNet().forward)
    assert same(step(model, x, False), expected)
    assert made
    assert type(triton_bn.revert(model)) is ResNet
    made.clear()
    step(model, x, False)
    assert not made


def test_tools_take_a_model_that_recomputes_as_they_take_any() -> None:
    model, x = converted().eval(), randn(4, 3, 8, 8)
    expected = ResNet().eval()(x, 2.0)
    torch.testing.assert_close(model(x, scale=2.0), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, 2.0), expected)
    torch.testing.assert_close(torch.export.export(model, (x, 2.0)).module()(x, 2.0), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, 2.0), expected)
    torch.testing.assert_close(
        torch.func.functional_call(model, dict(model.named_parameters()), (x, 2.0)), expected
    )


def test_a_model_that_can_have_no_subclass_is_refused_unchanged() -> None:
    graph = torch.fx.symbolic_trace(ResNet())
    patched = ResNet()
    patched.forward = patched.forward  # type: ignore[method-assign]
    for model in (graph, patched):
        with pytest.raises(ValueError, match="needs a subclass"):
            converted(model)
        assert not any(isinstance(m, _Fused) for m in model.modules())


@pytest.mark.dist
def test_a_converted_model_under_fsdp(computer: str, made: list[Any], group: None) -> None:
    x = randn(4, 3, 8, 8)
    expected = step(converted(), x, False)
    model = converted()
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.blocks, model):  # type: ignore[misc,operator]
        fully_shard(part, mesh=mesh)
    made.clear()
    model(x).float().square().mean().backward()
    grads = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    assert same(grads, expected[: len(grads)])
    assert made


@pytest.mark.models
@pytest.mark.parametrize(
    ("network", "most"),
    [
        ("MobileNetV2", 0.40), ("EfficientNet-B0", 0.48), ("DenseNet-121", 0.55),
        ("ResNet-50", 0.75), ("U-Net", 0.65),
    ],
)  # fmt: skip
def test_a_whole_model_keeps_less_with_the_same_gradients(
    network: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "on_gpu", lambda x: False)
    torchvision()
    rows = {row["way"]: row for row in memory.count(network, 2, 128)}
    assert all(row["status"] == "counted" for row in rows.values())
    assert rows["converted"]["share"] == 1
    assert rows["recompute"]["share"] <= most


@pytest.mark.models
def test_which_outputs_of_resnet_50_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each stage's blocks the first is kept, whose residual nobody keeps, then every other."""
    monkeypatch.setattr(route, "on_gpu", lambda x: False)
    model = triton_bn.convert(torchvision().models.resnet50(num_classes=2))
    blocks = [block for block in model.modules() if type(block).__name__ == "Bottleneck"]
    outputs: list[StorageWeakRef] = []
    for block in blocks:
        block.register_forward_hook(
            lambda m, args, y: outputs.append(StorageWeakRef(y.untyped_storage()))
        )
    with triton_bn.recompute():
        loss = model(randn(2, 3, 64, 64)).sum()
    kept = "".join(".x"[not output.expired()] for output in outputs)
    assert kept == "x.x" + "x.x." + "x.x.x." + "x.x"
    loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
def test_compiled_on_a_cpu_a_converted_network_keeps_what_stock_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(route, "on_gpu", lambda x: False)
    kept = []
    for model in (ResNet(), triton_bn.convert(ResNet()), converted()):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = compiled(randn(4, 3, 8, 8))
        assert y.requires_grad
        kept.append(sum(sizes.values()))
    assert kept[0] == kept[1] == kept[2] > 0
