"""What people do to a model after it was converted gives what it gives on the stock model."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune

import triton_bn
from triton_bn import route
from triton_bn.conversion import fuse
from triton_bn.conversion.convert import conversion_report, convert, revert


class Block(nn.Module):
    """Every way to fuse: an activation behind, an add with an activation, a residual that ends in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.down: Any = None
        self.alpha = 1.0

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out) * self.alpha


def sequence() -> Any:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


def network() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(sequence(), Block(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model.append(nn.ReLU())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (*module.parameters(), module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return model.double().eval()


class Frozen(nn.Module):
    def __init__(self, bn: Any) -> None:
        super().__init__()
        scale = bn.weight.detach() * (bn.running_var + bn.eps).rsqrt()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (bn.bias.detach() - bn.running_mean * scale)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class PerDomain(nn.Module):
    def __init__(self, bn: Any) -> None:
        super().__init__()
        self.norms, self.index = nn.ModuleList([bn, nn.BatchNorm2d(4).double()]), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.index](x)


def replaced(make: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    """Every layer, as recipes do it: by walking over the children."""

    def change(model: Any) -> Any:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, make(child).train(child.training))
        return model

    return change


def group_norm(bn: Any) -> nn.Module:
    return nn.GroupNorm(2, bn.num_features).double()


def folded(model: Any) -> Any:
    """Into the convolution before it, as ultralytics does: the layer deleted, the child's forward swapped."""
    model = folded_in_place(model)
    block = model[1]
    del block.bn1

    def forward_fuse(x: Tensor) -> Tensor:
        out = block.bn2(block.conv2(block.relu(block.conv1(x))))
        return block.relu(out + x)

    block.forward = forward_fuse
    return model


def folded_in_place(model: Any) -> Any:
    pairs = [(model[0], "0", "1"), (model[1], "conv1", "bn1"), (model[2], "0", "1")]
    for owner, conv, bn in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, bn)))
        setattr(owner, bn, nn.Identity())
    return model


def removed(model: Any) -> Any:
    del model[0][2]
    model[1].relu = nn.Identity()
    return model[:3]


def swapped(model: Any) -> Any:
    model[0][2], model[1].relu, model[3] = nn.LeakyReLU(0.1), nn.SiLU(), nn.PReLU().double()
    return model


def options_changed(model: Any) -> Any:
    model = swapped(model)
    model[0][2].negative_slope = 0.5
    model[1].alpha = 3.25
    model[0][1].eps = 0.3
    return model


def child_added(model: Any) -> Any:
    model[1].down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval()
    return model


def appended(model: Any) -> Any:
    for module in (nn.BatchNorm2d(4), nn.ReLU6()):
        model[2].append(module.double().eval())
    return model.insert(0, nn.Tanh())


def sliced(model: Any) -> Any:
    return nn.Sequential(*model[0][:2], *model[1:3])


def hooked(model: Any) -> Any:
    """Each hook sees what it sees on the stock model; one changes what it sees."""
    model.seen = []

    def see(module: nn.Module, inputs: Any, output: Tensor) -> None:
        model.seen.append(output.detach().clone())

    for module in (model[0][1], model[0][2], model[1].bn2, model[1].relu):
        module.register_forward_hook(see)
    model[2].register_forward_hook(lambda module, inputs, output: output - 1)
    model[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.5,))
    return model


def hooked_backward(model: Any) -> Any:
    model.seen = []

    def see(module: nn.Module, before: Any, after: Any) -> None:
        model.seen.append(after[0].clone())

    model[0][1].register_full_backward_hook(see)
    model[3].register_full_backward_hook(see)
    return model


def parametrized(model: Any) -> Any:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    parametrize.register_parametrization(model[0][1], "weight", Positive())
    return model


def pruned(model: Any) -> Any:
    prune.l1_unstructured(model[0][1], "weight", amount=0.5)
    prune.l1_unstructured(model[1].bn1, "bias", amount=0.5)
    return model


def forward_swapped(model: Any) -> Any:
    model[0][1].forward = lambda x: x * 2
    model[0][2].forward = lambda x: x - 2
    return model


def class_changed(model: Any) -> Any:
    model[0].__class__ = nn.Sequential
    model[1].relu.__class__ = Doubled
    return model


def domains(model: Any) -> Any:
    model[0][1], model[1].bn2 = PerDomain(model[0][1]), PerDomain(model[1].bn2)
    for module in (model[0][1], model[1].bn2):
        module.eval().index = 1
    return model


def retrained(model: Any) -> Any:
    """One layer by the batch's statistics, the rest frozen."""
    model[1].bn2.train()
    for parameter in model[0][1].parameters():
        parameter.requires_grad_(False)
    return model


def shared(model: Any) -> Any:
    model[1].bn1 = model[1].bn2 = model[0][1]
    return model


def synchronized(model: Any) -> Any:
    """PyTorch's, ours, or both: outside of a group they are plain layers in evaluation."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def synchronized_by_us(model: Any) -> Any:
    return triton_bn.SyncBatchNorm.convert_sync_batchnorm(model)


SURGERIES = [
    replaced(Frozen), replaced(group_norm), replaced(lambda bn: nn.Identity()), folded,
    folded_in_place, removed, swapped, options_changed, child_added, appended, sliced, hooked,
    hooked_backward, parametrized, pruned, forward_swapped, class_changed, domains, retrained,
    shared, synchronized, synchronized_by_us, copy.deepcopy, copy.copy,
    lambda model: pickle.loads(pickle.dumps(model)),
]  # fmt: skip


def observe(model: Any, x: Tensor, backward: bool = True) -> list[Tensor]:
    x = x.clone().requires_grad_(backward)
    model.zero_grad()
    y = model(x)
    if not backward:
        return [y.detach()]
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *gradients, *model.buffers(), *getattr(model, "seen", [])]  # type: ignore[list-item]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=["fused", "PyTorch"])
def fusing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """By the kernels (the interpreter's, without a GPU), or as on a CPU."""
    fuses = bool(request.param == "fused")
    if not fuses:
        monkeypatch.setattr(route, "INTERPRETED", False)
    return fuses


@pytest.mark.parametrize("change", SURGERIES, ids=lambda f: getattr(f, "__name__", ""))
def test_a_changed_model_is_the_changed_stock_model(
    change: Callable[[Any], Any], fusing: bool
) -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    stock, model = change(network()), change(convert(network()))
    assert_same(observe(model, x), observe(stock, x))
    if not fusing:
        again = convert(model)
        assert len(conversion_report(again).rows) == len(set(filter(is_norm, model.modules())))
        assert_same(observe(model, x, False), observe(stock, x, False))
    revert(model), revert(stock)  # which may have been given layers of ours
    assert not any("triton" in type(m).__module__ for m in model.modules())
    for a, b in zip(model.modules(), stock.modules(), strict=True):
        assert type(a).__name__ == type(b).__name__
        assert type(a) is type(b) or type(a).__mro__[1:] == type(b).__mro__[1:]


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def test_the_network_is_fused_before_it_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would say nothing."""
    found = []
    compute = fuse.Pending.compute

    def recorded(self: Any, activation: Any = None) -> Any:
        found.append((self.residual is not None, str(activation)))
        return compute(self, activation)

    monkeypatch.setattr(fuse.Pending, "compute", recorded)
    model = convert(network())
    assert [row.fused for row in conversion_report(model).rows] == [
        "relu", "relu", "add + relu", "relu",
    ]  # fmt: skip
    model(torch.randn(2, 4, 3, 2, dtype=torch.float64))
    assert found == [(False, "relu"), (False, "relu"), (True, "relu"), (False, "relu")]


def test_mkldnn_and_global_hooks() -> None:
    model, stock = convert(network().float()), network().float()
    x = torch.randn(2, 4, 5, 3)
    seen: list[list[str]] = []
    for m in (model, stock):
        names: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, names=names: names.append(type(module).__name__)
        )
        m(x)
        handle.remove()
        seen.append([name.replace("triton_bn.", "") for name in names])
    assert seen[0] == seen[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.utils.mkldnn itself
        importlib.import_module("torch.utils.mkldnn")
        results = [
            torch.utils.mkldnn.to_mkldnn(m)(x.to_mkldnn()).to_dense() for m in (model, stock)
        ]
    torch.testing.assert_close(*results)


def test_a_forward_that_is_replaced_on_the_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convert(network()), torch.randn(2, 4, 3, 2, dtype=torch.float64)
    monkeypatch.setattr(Block, "forward", lambda self, x: x * 3)
    assert_same([model(x)], [network()(x)])


class Outer(nn.Module):
    """b behind a sequence, taken by an activation and again."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        b = self.sequence(x)
        return F.relu(b) + b


def test_what_is_taken_twice_is_computed_once() -> None:
    torch.manual_seed(0)
    stock = Outer().double()
    model = convert(copy.deepcopy(stock))
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    assert_same(observe(model, x), observe(stock, x))


@pytest.mark.parametrize("beta", [1, 2])
def test_an_activation_with_an_option_that_is_not_named_is_not_fused(
    beta: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when softplus is added and its options are forgotten: gelu's kernels stand for it here."""
    monkeypatch.setitem(fuse._OPTIONS, "softplus", ())
    monkeypatch.setitem(fuse._PLAIN, "softplus", fuse._PLAIN["gelu"])
    monkeypatch.setitem(fuse._FUNCTIONS, F.softplus, "softplus")
    known = fuse.named({nn.Softplus: "softplus", nn.ReLU: "relu"})
    assert known == {nn.ReLU: "relu"}
    assert fuse.activation_of(F.softplus, (beta,)) is None
    assert fuse.activation_of(F.softplus, (), {"beta": beta}) is None
    assert fuse.activation_of(F.softplus) is fuse._PLAIN["gelu"]
    monkeypatch.setitem(fuse.MODULES, nn.Softplus, "softplus")
    monkeypatch.setitem(fuse._OPTIONS, "softplus", ("beta", "threshold"))
    assert fuse.activation_of(F.softplus, (beta,)) is None  # named, but nobody says what it means
    assert fuse.activation_of(nn.Softplus(beta)) is None


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A group of this process alone."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_fully_sharded_modules_revert_from_under_its_classes(mesh: Any) -> None:
    """FSDP2 puts a class of its own over a module's."""
    from torch.distributed.fsdp import fully_shard

    def sharded(model: Any) -> Any:
        for module in (model[0], model[1], model):
            fully_shard(module, mesh=mesh)
        return model

    def seen(model: Any) -> list[Tensor]:
        return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in observe(model, x)]

    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    stock, model = sharded(network()), sharded(convert(network()))
    expected = seen(stock)
    assert_same(seen(model), expected)
    revert(model)
    assert [type(m).__mro__[1:] for m in model.modules()] == [
        type(m).__mro__[1:] for m in stock.modules()
    ]
    assert_same(seen(model), expected)
    assert_same(seen(convert(model)), expected)


def test_threads_do_not_notice_a_conversion() -> None:
    stock, x = network(), torch.randn(2, 4, 3, 2, dtype=torch.float64)
    expected, stop, errors = stock(x), threading.Event(), []
    before = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__", "forward")}
    models = [network() for _ in range(8)]

    def run() -> None:
        while not stop.is_set():
            if not torch.equal(stock(x), expected):
                errors.append("another result")

    def change(model: Any) -> None:
        try:
            for _ in range(5):
                convert(model)
                revert(model)
            convert(model)
        except Exception as error:
            errors.append(repr(error))

    runner = threading.Thread(target=run)
    threads = [threading.Thread(target=change, args=(model,)) for model in models]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in (runner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    stop.set()
    runner.join()
    assert not errors
    assert all(getattr(nn.Module, name) is value for name, value in before.items())
    assert len({type(model) for model in models}) == 1
    assert_same(observe(models[3], x), observe(stock, x))


# ----------------------------------------------------------------------------- who watches and compiles


def test_a_compiled_model_is_one_graph_and_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, fusing: bool
) -> None:
    """Whether it fuses or not."""
    monkeypatch.setattr(route, "on_gpu", lambda x: fusing)  # as where operators stand for kernels
    monkeypatch.setattr(route, "INTERPRETED", False)
    model, stock = convert(network()).train(), network().train()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        assert_same(observe(compiled, x), observe(stock, x))
    assert len(graphs) == 1
    relus = sum("relu" in str(node.target) for node in graphs[0].graph.nodes)
    assert relus == (0 if fusing else 4)


def calls(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


def test_torch_fx_records_the_original_calls(fusing: bool) -> None:
    model, stock = convert(network()), network()
    traced, expected = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(stock)
    assert calls(traced.graph) == calls(expected.graph)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(traced(x), stock(x), rtol=1e-10, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.ao itself
        quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
        mapping = importlib.import_module("torch.ao.quantization").get_default_qconfig_mapping()
        optimization = importlib.import_module("torch.fx.experimental.optimization")
        for m in (model, stock):
            m.float()
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x.float(),))
        optimized = optimization.fuse(copy.deepcopy(model))
    torch.testing.assert_close(prepared(x.float()), stock(x.float()))
    torch.testing.assert_close(optimized(x.float()), stock(x.float()))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = triton_bn.BatchNorm2d(4, activation="relu").double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, x)


def test_layers_with_an_activation_and_a_residual_are_leaves_of_a_trace() -> None:
    model, x = Residual(), torch.randn(2, 4, 3, 2, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    assert calls(traced.graph)[1] == ("call_module", "bn")
    assert torch.equal(traced(x), model(x))


def test_exported_traced_and_compiled_evaluation_are_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = convert(network()), network()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    monkeypatch.setattr(fuse, "computes", lambda layer: pytest.fail("asked for kernels"))
    monkeypatch.setattr(route, "INTERPRETED", False)
    program = torch.export.export(model, (x,))
    assert sum("relu" in str(node.target) for node in program.graph.nodes) == 4
    assert_same([program.module()(x)], [stock(x)])
    assert_same([model(x)], [stock(x)])


def test_fusing_costs_few_python_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of deciding at the call, in calls of functions, which no other load on the machine changes."""
    monkeypatch.setattr(route, "INTERPRETED", True)
    monkeypatch.setattr(triton_bn.BatchNorm2d, "_fused", lambda self, input, *others: input)
    x = torch.ones(2, 4, 3, 2)

    def calls(model: nn.Module) -> int:
        events: list[str] = []
        model(x)  # what is remembered from the first call on
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            model(x)
        finally:
            sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    pairs = 8
    stock = [layer for _ in range(pairs) for layer in (nn.BatchNorm2d(4), nn.ReLU())]
    direct = nn.Sequential(*[triton_bn.BatchNorm2d(4, activation="relu") for _ in range(pairs)])
    more = calls(convert(nn.Sequential(*stock))) - calls(direct)
    assert more <= 9 * pairs
