"""Who computes: each row of :func:`triton_bn.route.route`'s table, and what PyTorch's own operators must then give."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import triton_bn
from triton_bn import Activation, route
from triton_bn.functional import batch_norm

#: What a call adds to its input by who would compute it, so that every transform hands it out.
MARKS = {"kernels": 1.0, "operators": 2.0, "torch": 3.0}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a GPU's."""
    monkeypatch.setattr(route, "on_gpu", lambda x: True)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a CPU's, whatever TRITON_INTERPRET says."""
    monkeypatch.setattr(route, "on_gpu", lambda x: x.is_cuda)


class Mark(nn.Module):
    """Adds :data:`MARKS` of who would compute a call in this layer's mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + MARKS[route.route(x, None, batch_statistics=self.training)]


def who(x: Tensor) -> str:
    return {mark: name for name, mark in MARKS.items()}[float(x.flatten()[0])]


class Silent(TorchDispatchMode):
    """A mode that only watches."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def under_mode(mark: Mark, x: Tensor) -> Tensor:
    with Silent():
        return mark(x)


def with_tangent(mark: Mark, x: Tensor) -> Tensor:
    with fwad.dual_level():
        return mark(fwad.make_dual(x, x)).clone()


def exported(strict: bool) -> Callable[[Mark, Tensor], Tensor]:
    return lambda mark, x: torch.export.export(mark, (x,), strict=strict).module()(x)


def compiled(mark: Mark, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(mark, backend="eager", fullgraph=True)(x)


def compiled_vmap(mark: Mark, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(torch.func.vmap(mark), backend="eager", fullgraph=True)(x)


#: way of calling: who computes on a GPU by batch statistics, and by running ones.
ROWS: dict[str, tuple[Callable[[Mark, Tensor], Tensor], str, str]] = {
    "eager": (lambda mark, x: mark(x), "kernels", "kernels"),
    "export": (exported(False), "torch", "torch"),
    "strict export": (exported(True), "torch", "torch"),
    "jit.trace": (lambda mark, x: torch.jit.trace(mark, x)(x), "torch", "torch"),
    "vmap": (lambda mark, x: torch.func.vmap(mark)(x), "torch", "torch"),
    "forward AD": (with_tangent, "torch", "torch"),
    "compile": (compiled, "operators", "torch"),
    "compile of vmap": (compiled_vmap, "torch", "torch"),
    "subclass": (lambda mark, x: mark(TwoTensor(x, x)).a, "torch", "torch"),
    "mode": (under_mode, "operators", "operators"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ROWS)
def test_who_computes_a_gpu_tensor(gpu: None, way: str) -> None:
    call, batch, running = ROWS[way]
    assert who(call(Mark(), torch.zeros(2, 3))) == batch
    assert who(call(Mark().eval(), torch.zeros(2, 3))) == running


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ROWS)
def test_pytorch_computes_a_cpu_tensor_whatever_the_way(cpu: None, way: str) -> None:
    call = ROWS[way][0]
    assert who(call(Mark(), torch.zeros(2, 3))) == "torch"
    assert who(call(Mark().eval(), torch.zeros(2, 3))) == "torch"


def test_who_computes_tensors_without_data() -> None:
    assert route.route(torch.empty(2, 3, device="meta"), batch_statistics=True) == "torch"
    with FakeTensorMode(), torch.no_grad():  # PyTorch's CPU build has no autograd for a GPU
        x = torch.empty(2, 3, device="cuda")
        assert route.route(x, torch.empty(3, device="cuda"), batch_statistics=True) == "operators"
        y = triton_bn.BatchNorm1d(3, device="cuda", activation="relu")(x)
        assert (y.shape, y.device.type) == ((2, 3), "cuda")
    assert route.route(x, batch_statistics=False) == "operators", "outside of the mode as well"


def test_a_batch_shared_with_other_processes_is_never_pytorchs(cpu: None) -> None:
    x = torch.zeros(2, 3)
    assert route.route(x, batch_statistics=True, shared=True) == "kernels"
    with Silent():
        assert route.route(x, batch_statistics=True, shared=True) == "operators"


# PyTorch's own operators: the stock layer's numbers to the last bit.

#: name: the module of torch.nn that a stock model has.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "gelu": nn.GELU, "elu": nn.ELU, "mish": nn.Mish,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip


class Stock(nn.Module):
    """A layer of torch.nn, the addition and an activation's module, as a stock model has them."""

    def __init__(self, layer: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = self.layer(x)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


def step(call: Callable[..., Tensor], layer: nn.Module, *inputs: Tensor | None) -> list[Tensor]:
    """What a call gives, its gradients, and the layer's statistics after it."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = call(*leaves)
    wanted = [t for t in (*leaves, *layer.parameters()) if t is not None]
    dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy), *(b.clone() for b in layer.buffers())]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """To the last bit and in the same layout."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", [None, *MODULES])
def test_on_a_cpu_it_is_the_stock_layer_to_the_last_bit(
    cpu: None, activation: str | None, training: bool
) -> None:
    kinds = (
        ("BatchNorm1d", (5, 3, 7)),
        ("BatchNorm2d", (4, 3, 5, 3)),
        ("BatchNorm3d", (2, 3, 2, 3, 5)),
        ("SyncBatchNorm", (4, 3)),
    )
    settings = (
        (torch.float32, "contiguous", {}),
        (torch.bfloat16, "channels_last", {"momentum": None}),
        (torch.float64, "cropped", {"affine": False, "dtype": torch.float64}),
        (torch.float32, "expanded_batch", {"track_running_stats": False}),
    )
    for (kind, shape), (dtype, layout, options) in zip(kinds, settings, strict=True):
        torch.manual_seed(0)
        # torch.nn's SyncBatchNorm refuses a CPU.
        twin = getattr(nn, "BatchNorm1d" if kind == "SyncBatchNorm" else kind)(3, **options)
        for parameter in twin.parameters():
            nn.init.uniform_(parameter)
        ours = getattr(triton_bn, kind)(3, **options, activation=activation)
        ours.load_state_dict(twin.state_dict())
        stock = Stock(twin, None if activation is None else MODULES[activation]())
        for residual in (False, True):
            x = oracle.arrange(torch.randn(shape).to(dtype) * 2, layout)
            added = torch.randn(shape).to(dtype) if residual else None
            for layer in (ours, stock):
                layer.train(training)
            assert_same(step(ours, ours, x, added), step(stock, twin, x, added))


def test_the_function_is_pytorchs_to_the_last_bit_and_takes_what_it_takes(cpu: None) -> None:
    x, weight = torch.randn(4, 3, 5), torch.rand(1, 3, 1)
    for training in (True, False):
        for strided, scale in ((False, weight), (True, None)):
            tables = torch.rand(3, 2).expand(2, 3, 2).clone()
            (mean, var), other = ((t if strided else t.T.contiguous().T).unbind(1) for t in tables)
            elu = Activation("elu", 0.5)
            got = batch_norm(x, mean, var, scale, None, training, activation=elu)
            want = F.elu(F.batch_norm(x, *other, scale, None, training), 0.5)
            assert_same([got, mean, var], [want, *other])


def test_a_residual_that_cannot_be_added_changes_nothing_on_a_cpu_either(cpu: None) -> None:
    layer = triton_bn.BatchNorm1d(3)
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 3), torch.randn(5, 3))
    assert layer.num_batches_tracked == 0
    y = layer(torch.randn(4, 3), torch.randn(2, 4, 3).double())  # broadcast and promoted as by +
    assert (y.shape, y.dtype) == ((2, 4, 3), torch.float64)


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_dtensor_is_computed_as_by_the_stock_layer(gpu: None, mesh: Any, training: bool) -> None:
    """Distributed tensors have rules for PyTorch's own operators, and none for ours."""
    results = []
    for kind in (triton_bn.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(0)
        layer = kind(3).train(training)
        for name, parameter in list(layer.named_parameters()):
            setattr(
                layer,
                name,
                nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate()])),
            )
        for name, buffer in list(layer.named_buffers()):
            setattr(layer, name, distribute_tensor(buffer, mesh, [Replicate()]))
        x = distribute_tensor(torch.randn(2, 3, 4, 4), mesh, [Replicate()])
        y = layer(x)
        assert type(y) is DTensor
        results.append([y.full_tensor().detach(), layer.running_var.full_tensor()])
    assert_same(*results)


def test_meta_tensors_get_shapes() -> None:
    layer = triton_bn.BatchNorm2d(3, device="meta", activation="silu")
    x = torch.empty(2, 3, 4, 4, device="meta").to(memory_format=torch.channels_last)
    for _ in range(2):
        y = layer(x, x)
        assert (y.shape, y.stride(), y.device.type) == (x.shape, x.stride(), "meta")
        layer.eval()


# Compiled and exported: the stock model's program.


def models() -> list[nn.Module]:
    """A model with batch norm in it, converted and stock."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    for layer in (stock[1], stock[4]):
        for vector in (*layer.parameters(), layer.running_mean):
            nn.init.uniform_(vector)
    return [triton_bn.convert(copy.deepcopy(stock)), stock]


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_exported_program_is_the_stock_models(gpu: None, training: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    programs = [torch.export.export(model.train(training), (x,)) for model in models()]
    assert targets(programs[0]) == targets(programs[1])
    programs = [program.run_decompositions() for program in programs]
    assert targets(programs[0]) == targets(programs[1])
    assert not any("triton_bn" in target for target in targets(programs[0]))
    assert_same(*[[program.module()(x).detach()] for program in programs])


# Platforms without Triton, and what an import costs.


def run(script: str, **environment: str) -> str:
    """What a script prints in a process of its own, without TRITON_INTERPRET."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


WITHOUT_TRITON = """
    import sys
    sys.modules["triton"] = None  # an import of it raises ModuleNotFoundError
    import warnings
    import torch, triton_bn
    from triton_bn import route
    from triton_bn.__main__ import main
"""


def test_without_triton_all_but_the_kernels_works() -> None:
    said = run(
        WITHOUT_TRITON
        + """
    model = triton_bn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    layer = triton_bn.BatchNorm2d(4, activation="silu")
    layer(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)).sum().backward()
    torch.export.export(model.eval(), (torch.randn(2, 3, 4, 4),))
    print(layer.plan(torch.empty(8, 4, 3, 3), device="H100"))
    assert main(["info"]) == 0
    assert main(["inspect", "8,4,3,3"]) == 2
    with torch._subclasses.FakeTensorMode(), warnings.catch_warnings(record=True) as warned:
        x = torch.empty(2, 3, device="cuda")
        assert [route.route(x, batch_statistics=True) for _ in range(2)] == ["torch"] * 2
    print(*[warning.message for warning in warned])
    """
    )
    assert re.search(r"^triton +not installed$", said, re.MULTILINE)
    assert "error: this needs Triton, which is not installed" in said
    assert "Triton is not installed, so PyTorch's own operators compute on this GPU" in said


def test_without_triton_asking_for_its_interpreter_says_what_is_missing() -> None:
    said = run(
        WITHOUT_TRITON
        + """
    try:
        triton_bn.BatchNorm1d(3)(torch.randn(4, 3))
    except ModuleNotFoundError as error:
        print(error)
    """,
        TRITON_INTERPRET="1",
    )
    assert "kernels need Triton, which is not installed" in said


def test_an_import_loads_neither_dynamo_nor_triton() -> None:
    loaded = run("import torch, triton_bn, sys; print(*sys.modules)").split()
    assert not {"torch._dynamo", "triton", "triton_bn.launch", "rich", "matplotlib"} & {*loaded}
    said = run("""
    import os, torch, triton_bn
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        triton_bn.route.kernels()
    except RuntimeError as error:
        print(error)
    """)
    assert "TRITON_INTERPRET was changed after" in said
