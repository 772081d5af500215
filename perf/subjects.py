"""A case's providers made ready: built on one set of random tensors, and past the gate or out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perf import gate
from perf.cases import Case
from perf.clocks import Call
from perf.providers import COPY, Provider, Unsupported, recorded
from perf.resnet import ResNet50

__all__ = ["Subject", "network", "subjects_of"]


@dataclass
class Subject:
    """A provider at work on a case: its calls by measure; "measured" unless something is wrong."""

    provider: str
    status: str = "measured"
    detail: str = ""
    plan: str = ""
    calls: dict[str, Call] = field(default_factory=dict)
    #: Columns of its rows that were found out beside the timing.
    facts: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """Notes what another project, the compiler or the driver raised: it costs one row."""
        if isinstance(error, torch.AcceleratorError):
            raise error  # nothing works on this GPU from here on
        first = (str(error).strip() or "no message").splitlines()[0]
        self.status, self.detail = "error", f"{type(error).__name__}: {first[:200]}"


def subjects_of(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    networks: Callable[[str], nn.Module],
    *,
    judged: bool = True,
) -> list[Subject]:
    """All that take the case; of a layer's, the copy comes first.

    Each has run once then. Without being ``judged`` that is all: to compile what is needed.
    """
    torch.manual_seed(0)
    if device.type == "cuda":
        # The ninth shape of a compiled function would be one too many, and run uncompiled.
        torch.compiler.reset()
    if case.op == "model":
        compiled = "compiled step" in case.measures
        # torch's own gradient is the yardstick of every network.
        chosen = [
            p for p in providers if p.network and (p.compiles == compiled or p.name == "torch")
        ]
        return _networks(case, chosen, device, networks)
    return _layers(case, [p for p in providers if p.build], device, judged)


# ---- One layer -----------------------------------------------------------------------------------


def _layers(
    case: Case, providers: Sequence[Provider], device: torch.device, judged: bool
) -> list[Subject]:
    before, layer = _given(case, device)
    subjects = [_copy(case, before)]
    usual = ""
    for provider in providers:
        subject = Subject(provider.name)
        try:
            _prepare(subject, provider, case, before, copy.deepcopy(layer), judged)
        except Unsupported:
            continue
        except Exception as error:
            subject.fail(error)
        if provider.name == "triton_bn":
            usual = subject.plan
        elif subject.plan and subject.plan == usual:
            continue  # the forced driver is the usual one
        subjects.append(subject)
    return subjects


def _given(case: Case, device: torch.device) -> tuple[gate.Before, Any]:
    """Random tensors, and the stock layer."""
    training = case.training

    def random() -> Tensor:
        x = torch.randn(case.shape, device=device, dtype=case.torch_dtype)
        return x.contiguous(memory_format=case.memory_format)

    x, dy = random().add_(0.5).requires_grad_(training), random()
    residual = random().requires_grad_(training) if case.residual else None
    rank = max(len(case.shape) - 2, 1)
    layer: Any = getattr(nn, f"BatchNorm{rank}d")(case.shape[1], device=device).train(training)
    with torch.no_grad():
        for tensor in (layer.weight, layer.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (layer.bias, layer.running_mean):
            tensor.normal_()
    running = layer.running_mean.clone(), layer.running_var.clone()
    return (
        gate.Before(x, residual, dy, layer.weight, layer.bias, *running, layer.momentum, layer.eps),
        layer,
    )


def _copy(case: Case, before: gate.Before) -> Subject:
    """The roofline: torch's elementwise kernels, reading and writing as many tensors."""
    x, dy = before.x.detach(), before.dy
    out, more = torch.empty_like(x), torch.empty_like(x)
    launches: dict[tuple[int, int], Callable[[], Any]] = {
        (1, 1): lambda: out.copy_(x),
        (2, 1): lambda: torch.add(x, dy, out=out),
        (2, 2): lambda: (out.copy_(x), more.copy_(dy)),
    }

    def call(measure: str) -> Call:
        chosen = [launches[passes] for passes in case.traffic(measure)]
        return Call(COPY, lambda _: [launch() for launch in chosen])

    return Subject(COPY, calls={name: call(name) for name in case.measures if case.traffic(name)})


class _Alias(torch.autograd.Function):
    """The same memory, as a tensor that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def _prepare(
    subject: Subject,
    provider: Provider,
    case: Case,
    before: gate.Before,
    layer: Any,
    judged: bool,
) -> None:
    """Builds a provider's calls, and runs it once through the gate."""
    assert provider.build is not None
    x, residual, training = before.x, before.residual, case.training
    if provider.in_place:
        x = x.detach().clone().requires_grad_(training)
    norm = provider.build(layer, case, x)
    inputs = [x, layer.weight, layer.bias, *([] if residual is None else [residual])]

    def forward(_: Any = None) -> Tensor:
        return norm(_Alias.apply(x) if provider.in_place else x, residual)

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, before.dy)

    def evaluate(_: Any = None) -> Tensor:
        with torch.no_grad():
            return norm(x, residual)

    def call(run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> Call:
        return Call(provider.name, run, prepare, provider.inside)

    both = call(lambda _: backward(forward()))
    subject.calls = {
        "forward": call(forward),
        "backward": call(backward, forward),
        "forward+backward": both,
        "host": both,
        "eval": call(evaluate),
    }
    plans: dict[str, Any] = {}
    with provider.inside(), recorded(plans):
        y = forward() if training else evaluate()
        results = {"y": y.detach().clone() if provider.in_place else y.detach()}
        if training:
            results |= zip(("dx", "dweight", "dbias", "dresidual"), backward(y), strict=False)
            results |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    subject.plan = "; ".join(f"{direction} {plan}" for direction, plan in plans.items())
    if not judged:
        return
    subject.detail = gate.judge(case, before, results)
    if subject.detail:
        subject.status = "failed the gate"
    elif "memory" in case.measures:
        with provider.inside():
            subject.facts = _memory(forward, backward, x.device)


def _memory(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], device: torch.device
) -> dict[str, Any]:
    """Bytes kept for backward (each memory once), and the most that both take beside the inputs."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    on_gpu, base = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    backward(y)
    peak = torch.cuda.max_memory_allocated(device) - base if on_gpu else None
    return {"kept_bytes": sum(kept.values()), "peak_bytes": peak}


# ---- A step of a whole network -------------------------------------------------------------------


def network(name: str) -> nn.Module:
    """The network of a step, with fresh weights."""
    return {"ResNet-50": ResNet50}[name]()


def _networks(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    networks: Callable[[str], nn.Module],
) -> list[Subject]:
    """The gate of a network: its gradient is at most twice as far from float64's as torch's is."""
    x = torch.randn(case.shape, device=device).contiguous(memory_format=case.memory_format)
    target = torch.randint(1000, case.shape[:1], device=device)
    stock = networks(case.network).to(device)
    stock.to(memory_format=case.memory_format)  # type: ignore[call-overload]
    exact = copy.deepcopy(stock).double()
    nn.functional.cross_entropy(exact(x.double()), target).backward()
    truth = _gradient(exact)
    del exact
    subjects, usual = [], math.nan
    for provider in sorted(providers, key=lambda provider: provider.name != "torch"):
        assert provider.network is not None
        subject = Subject(provider.name)
        subjects.append(subject)
        try:
            model = provider.network(copy.deepcopy(stock))
            step = _step(case, model, x, target)
            step(None)
            away = ((_gradient(model) - truth).norm() / truth.norm()).item()
        except Exception as error:
            subject.fail(error)
            continue
        if provider.name == "torch":
            usual = away
        subject.detail = f"gradient off by {away:.3g} of its norm, torch's by {usual:.3g}"
        if not away <= 2 * usual:  # NaN is wrong
            subject.status = "failed the gate"
        subject.calls = {name: Call(provider.name, step) for name in case.measures}
    return subjects


def _step(case: Case, model: nn.Module, x: Tensor, target: Tensor) -> Callable[[Any], None]:
    # The weights must move little: they are the same in the last round as in the first.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step(_: Any) -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, case.torch_dtype):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def _gradient(model: nn.Module) -> Tensor:
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    return torch.cat([p.grad.flatten().double() for _, p in named if p.grad is not None])
