"""The layers under torch.compile, torch.export and CUDA graphs: one graph, the same numbers, moving statistics."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import triton_bn

pytestmark = [
    # Dynamo's and inductor's own.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
NEEDS_COMPILER = pytest.mark.skipif(
    not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="inductor needs a C++ compiler",
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before or after, and convolutions in float32 whoever chooses their algorithm."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Layers called in every way: with and without an activation, a residual and a momentum."""

    def __init__(
        self, kind: type[nn.Module] = triton_bn.BatchNorm2d, momentum: float | None = None
    ) -> None:
        super().__init__()
        self.fused = kind is not nn.BatchNorm2d
        self.enter, self.leave = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.first = kind(3, **{"activation": "silu"} if self.fused else {})
        self.second = kind(3, momentum=momentum, **{"activation": "relu"} if self.fused else {})
        self.third = kind(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.fused:
            x = self.second(self.first(x), x)
        else:
            x = nn.functional.relu(self.second(nn.functional.silu(self.first(x))) + x)
        return self.third(self.leave(x))


def net(device: torch.device, *arguments: Any, training: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net(*arguments)
    for layer in (model.first, model.second, model.third):
        for vector in (*layer.parameters(), layer.running_mean):
            vector.data.uniform_(-1, 1)
    return model.to(device).train(training)


def images(device: torch.device, *shape: int, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return oracle.arrange(torch.randn(shape, generator=generator), layout).to(device)


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a call returns, every gradient, and the model's buffers after it."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = call(x)
    y.pow(3).sum().backward()
    results = {"y": y.detach(), "x": x.grad}
    results |= {name: p.grad for name, p in model.named_parameters()}
    return results | {name: b.clone() for name, b in model.named_buffers()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal but for the order of sums: by float32's eps, of the largest value."""
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        other = want[name]
        assert tensor.stride() == other.stride(), name
        if tensor.is_floating_point():
            bound = 64 * torch.finfo(tensor.dtype).eps * float(other.abs().amax())
            torch.testing.assert_close(
                tensor, other, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(tensor, other), name


def operators(graph: torch.fx.GraphModule) -> list[str]:
    """The names of our operators in a graph, in order: those of batch statistics."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [
        name.removeprefix("triton_bn.").split(".")[0] for name in targets if "triton_bn" in name
    ]


def compiled_graphs(counter: CompileCounterWithBackend) -> list[list[str]]:
    """Our operators in each graph that was compiled."""
    return [names for names in map(operators, counter.graphs) if names]


# torch.compile.


@pytest.mark.parametrize(
    ("training", "layout"),
    [(True, "channels_last"), (False, "contiguous")],
    ids=["training", "eval"],
)
def test_compiled_it_does_what_eager_does(
    device: torch.device, layout: str, training: bool
) -> None:
    """Without a graph break, and without a graph for each batch size."""
    model = net(device, training=training)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (4, 6):
        x = images(device, batch, 2, 5, 3, layout=layout)
        assert_close(step(compiled, model, x), step(twin, twin, x))
    graphs = [operators(graph) for graph in counter.graphs]
    assert 1 <= len(graphs) <= 2
    assert all(names == (["forward"] * 3 if training else []) for names in graphs)
    for batch in (9, 12):
        x = images(device, batch, 2, 5, 3, layout=layout)
        assert_close(step(compiled, model, x), step(twin, twin, x))
    assert len(counter.graphs) == len(graphs), "compiled again for another batch size"


@pytest.mark.parametrize("momentum", [np.float64(0.25), np.float32(0.25), torch.tensor(0.25)])
def test_compiled_momentum_is_any_number(device: torch.device, momentum: Any) -> None:
    """In one graph where PyTorch's layer is compiled to one."""
    layer = triton_bn.BatchNorm2d(3, momentum=momentum, device=device)
    twin = triton_bn.BatchNorm2d(3, momentum=0.25, device=device)
    x = images(device, 4, 3, 5, 3)
    one_graph = isinstance(momentum, float)
    assert_close(
        step(torch.compile(layer, backend="aot_eager", fullgraph=one_graph), layer, x),
        step(twin, twin, x),
    )


@NEEDS_COMPILER
@MODES
def test_inductor_does_what_eager_does(device: torch.device, training: bool) -> None:
    """What stands around the layer becomes inductor's kernels, also where that needs other layouts."""

    def call(x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x * 2, x.transpose(2, 3).sigmoid()) + x

    layer = triton_bn.BatchNorm2d(3, momentum=None, activation="relu", device=device).train(
        training
    )
    twin = copy.deepcopy(layer)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n in (4, 6):
        x = images(device, n, 3, 5, 5, layout="channels_last")
        assert_close(
            step(lambda x: compiled(x, layer), layer, x), step(lambda x: call(x, twin), twin, x)
        )


def test_one_graph_serves_every_size(device: torch.device) -> None:
    layer = triton_bn.BatchNorm2d(3, activation="relu", device=device)
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: layer(x, x.sin()), backend=counter, fullgraph=True, dynamic=True
    )
    for shape in ((4, 3, 5, 6), (2, 3, 4, 7), (8, 3, 9, 5)):
        x = images(device, *shape)
        assert_close(step(compiled, layer, x), step(lambda x: twin(x, x.sin()), twin, x))
    assert len(compiled_graphs(counter)) == 1


@pytest.mark.parametrize(
    ("mode", "training"),
    [(torch.no_grad, True), (torch.inference_mode, False)],
    ids=["training", "eval"],
)
def test_compiled_without_gradients(
    device: torch.device, mode: Callable[[], Any], training: bool
) -> None:
    model = net(device, training=training)
    twin = copy.deepcopy(model)
    x = images(device, 4, 2, 5, 3)
    with mode():
        got, want = torch.compile(model, backend="aot_eager", fullgraph=True)(x), twin(x)
    assert not got.requires_grad
    assert_close(
        {"y": got, **dict(model.named_buffers())}, {"y": want, **dict(twin.named_buffers())}
    )


def test_compiled_under_autocast(device: torch.device) -> None:
    model = net(device)
    twin = copy.deepcopy(model)
    results = []
    for call, owner in (
        (torch.compile(model, backend="aot_eager", fullgraph=True), model),
        (twin, twin),
    ):
        x = images(device, 4, 2, 5, 3)
        with torch.autocast(device.type, torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        y.float().pow(3).sum().backward()
        results.append(
            {n: p.grad for n, p in owner.named_parameters()} | dict(owner.named_buffers())
        )
    assert {t.dtype for n, t in results[0].items() if "tracked" not in n} == {torch.float32}
    assert_close(*results)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_statistics_under_checkpointing_and_compile_advance_as_pytorchs(
    device: torch.device, inside: bool
) -> None:
    """Checkpointing inside a compiled function advances them once, around it twice."""
    results = []
    for kind in (triton_bn.BatchNorm2d, nn.BatchNorm2d):
        torch._dynamo.reset()
        model = net(device, kind, 0.3)

        compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
        if inside:
            call = compiled(partial(checkpoint, model, use_reentrant=False))
        else:
            call = partial(checkpoint, compiled(model), use_reentrant=False)
        results.append(step(call, model, images(device, 4, 2, 5, 3)))
        assert model.first.num_batches_tracked == (1 if inside else 2)
    assert_close(*results)


TRANSFORMS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "grad": lambda f: grad(lambda x: f(x, x).pow(3).sum()),
    "vmap": lambda f: lambda x: vmap(lambda t: f(t))(torch.stack([x, x + 1])),
    "jacrev": lambda f: jacrev(lambda x: f(x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compiled_transforms(
    device: torch.device, transform: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    layer = triton_bn.BatchNorm2d(3, track_running_stats=False, activation="silu", device=device)
    x = images(device, 2, 3, 2, 2)
    f = transform(layer)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert_close({"": got.detach()}, {"": f(x).detach()})


def test_compiled_autograd(device: torch.device) -> None:
    """It records what eager layers left for backward."""
    model = net(device)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    x = images(device, 4, 2, 5, 3)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
        got = step(model, model, x)
    assert compiled_graphs(counter) == [["backward"] * 3]
    assert_close(got, step(twin, twin, x))


def test_second_derivatives_around_a_compiled_layer(device: torch.device) -> None:
    """A graph breaks at autograd.grad, and dynamo takes the backward itself for a function to compile."""
    layer = triton_bn.BatchNorm2d(3, activation="silu", dtype=torch.float64, device=device)

    def penalty(x: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return dx.square().sum()

    results = []
    for f in (penalty, torch.compile(penalty, backend="eager")):
        x = images(device, 4, 3, 2, 2).double().requires_grad_()
        results.append({"x": torch.autograd.grad(f(x), x)[0]})
    assert_close(results[1], results[0])


# torch.export.


@MODES
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_program_does_what_eager_does(
    device: torch.device, training: bool, strict: bool
) -> None:
    """For any batch size; in training its statistics, buffers of its own, advance."""
    model = net(device, training=training)
    batch = torch.export.Dim("batch", min=2, max=64)
    x = images(device, 4, 2, 5, 3)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert not operators(exported.graph_module)
    program, model = exported.module(), copy.deepcopy(model)
    for n in (4, 9):
        x = images(device, n, 2, 5, 3)
        assert_close({"y": program(x).detach()}, {"y": model(x).detach()})
    want = {
        name: t.detach() for name, t in model.state_dict().items() if name in program.state_dict()
    }
    assert_close({name: t.detach() for name, t in program.state_dict().items()}, want)
    assert not training or want["second.num_batches_tracked"] == 2


# CUDA graphs.


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_captured_step_replays_and_statistics_advance(device: torch.device, layout: str) -> None:
    model = net(device)
    twin = copy.deepcopy(model)
    batches = [images(device, 16, 2, 5, 3, layout=layout).pow(i + 1) for i in range(4)]
    x = batches[0].clone(memory_format=torch.preserve_format).requires_grad_()
    state = copy.deepcopy(model.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).pow(3).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
        y.pow(3).sum().backward()
    for batch in batches:
        with torch.no_grad():
            x.copy_(batch)
        graph.replay()
        # A captured backward writes its gradients anew at each replay.
        got = {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()}
        assert_close(got | dict(model.named_buffers()), step(twin, twin, batch))
    assert model.second.num_batches_tracked == len(batches)


@pytest.mark.gpu
@MODES
def test_reduce_overhead_replays_and_statistics_advance(
    device: torch.device, training: bool
) -> None:
    model = net(device, training=training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for i in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = images(device, 16, 2, 5, 3).pow(i + 1)
        assert_close(step(compiled, model, x), step(twin, twin, x))
    assert model.second.num_batches_tracked == 5 * training
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("grad_mode", [nullcontext, torch.no_grad])
def test_make_graphed_callables(device: torch.device, grad_mode: Callable[[], Any]) -> None:
    twin = triton_bn.BatchNorm2d(3, activation="relu", device=device)
    sample = images(device, 16, 3, 5, 3).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(twin), (sample,))
    graphed.load_state_dict(twin.state_dict())  # capturing it took steps
    for i in range(3):
        x = images(device, 16, 3, 5, 3).pow(i + 1)
        with grad_mode():
            assert_close({"y": graphed(x).detach()}, {"y": twin(x).detach()})
    assert_close(dict(graphed.named_buffers()), dict(twin.named_buffers()))
