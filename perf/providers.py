"""Who computes: ours by driver, torch eager and compiled, and other projects where importable.

A provider turns a stock ``torch.nn`` layer into ``f(x, residual) -> y``, with the layer's own
parameters and running statistics; what it does not fuse, torch adds behind it. One that cannot take
a case raises :class:`Unsupported` and has no row for it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_bn
from perf.cases import Case
from triton_bn.plan import Device, Plan, candidates
from triton_bn.problem import Problem
from triton_bn.tuning.resolve import choosing

__all__ = [
    "COPY",
    "PROVIDERS",
    "Choice",
    "Norm",
    "Provider",
    "Unsupported",
    "available",
    "of_driver",
    "planned",
    "recorded",
]

#: f(x, residual or None) -> y
Norm = Callable[[Tensor, Tensor | None], Tensor]

DRIVERS: tuple[str, ...] = get_args(get_type_hints(Plan)["driver"])

#: The roofline, a row beside the providers': the same bytes, only moved.
COPY = "copy"


class Unsupported(Exception):
    """The provider does not do this case."""


@dataclass(frozen=True)
class Provider:
    """``build(layer, case, x)`` gives what is timed, ``inside`` surrounds every call of it.

    ``network(model)`` does the same for a whole network, in its own time where it ``compiles`` it
    (minutes). ``module`` must be importable. A provider that works ``in_place`` overwrites its input.
    """

    name: str
    build: Callable[[Any, Case, Tensor], Norm] | None = None
    network: Callable[[nn.Module], nn.Module] | None = None
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    module: str | None = None
    in_place: bool = False
    compiles: bool = False


# ---- torch ---------------------------------------------------------------------------------------


def followed(norm: Callable[[Tensor], Tensor], case: Case, in_place: bool = False) -> Norm:
    """``norm`` and what follows it as torch does it (as models write it: in place)."""

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x)
        if residual is not None:
            y = y.add_(residual) if in_place else y + residual
        return F.relu(y, inplace=in_place) if "relu" in case.op else y

    return run


def stock(layer: Any, case: Case, x: Tensor) -> Norm:
    return followed(layer, case, in_place=True)


def cudnn(layer: Any, case: Case, x: Tensor) -> Norm:
    select = torch._C._select_batch_norm_backend
    running = layer.running_mean, layer.running_var
    chosen = select(x, layer.weight, layer.bias, *running, layer.training, layer.eps)
    if chosen != torch._C._BatchNormBackend.Cudnn:  # type: ignore[attr-defined]
        raise Unsupported("torch does not choose cuDNN here")
    return stock(layer, case, x)


def without_cudnn() -> AbstractContextManager[Any]:
    return torch.backends.cudnn.flags(enabled=False)


def compiled(layer: Any, case: Case, x: Tensor) -> Norm:
    if x.device.type != "cuda":
        raise Unsupported("timed on GPUs only")
    run: Norm = torch.compile(stock(layer, case, x), dynamic=False)
    return run


def compiled_network(model: nn.Module) -> nn.Module:
    model.compile(dynamic=False)
    return model


# ---- Ours ----------------------------------------------------------------------------------------


def ours(layer: Any, case: Case, x: Tensor) -> Norm:
    own = getattr(triton_bn, type(layer).__name__)(
        layer.num_features, activation="relu" if "relu" in case.op else None
    )
    own.train(layer.training)
    own.weight, own.bias = layer.weight, layer.bias
    for name, buffer in layer.named_buffers():
        setattr(own, name, buffer)
    run: Norm = own
    return run


@contextmanager
def recorded(plans: dict[str, Plan]) -> Iterator[None]:
    """Collects the plans that run, by direction."""

    def choose(problem: Problem, device: Device, usual: Callable[[], Plan]) -> Plan:
        plans[problem.direction] = plan = usual()
        return plan

    with choosing(choose):
        yield


#: (problem, device, the plan that it would run under) -> the plan that it shall run under.
Choice = Callable[[Problem, Device, Plan], Plan]


@contextmanager
def planned(choice: Choice) -> Iterator[None]:
    """Every problem runs under the plan of this choice, which may raise :class:`Unsupported`."""

    with choosing(lambda problem, device, usual: choice(problem, device, usual())):
        yield


@cache
def of_driver(driver: str, problem: Problem, device: Device, plan: Plan) -> Plan:
    """A plan of this driver: the usual one, or else the first candidate."""
    for other in (plan, *candidates(problem, device)):
        if other.driver == driver:
            return other
    raise Unsupported(f"no {driver} plan")


def converted(model: nn.Module) -> nn.Module:
    return triton_bn.convert(model)


# ---- Other projects ------------------------------------------------------------------------------


def flag_gems(layer: Any, case: Case, x: Tensor) -> Norm:
    """Its operators as it registers them for ``native_batch_norm``; they fuse nothing."""
    gems: Any = importlib.import_module("flag_gems")

    class BatchNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            running = layer.running_mean, layer.running_var
            options = layer.training, layer.momentum, layer.eps
            y, *stats = gems.batch_norm(x, weight, bias, *running, *options)
            ctx.save_for_backward(x, weight, *stats)
            result: Tensor = y
            return result

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, weight, *stats = ctx.saved_tensors
            running = layer.running_mean, layer.running_var
            return gems.batch_norm_backward(
                dy, x, weight, *running, *stats, layer.training, layer.eps, [True] * 3
            )

    return followed(lambda x: BatchNorm.apply(x, layer.weight, layer.bias), case)


def attorch(layer: Any, case: Case, x: Tensor) -> Norm:
    """It fuses the residual (``pre_act_add``) and the activation (``act_func``)."""
    module: Any = importlib.import_module("attorch")
    if x.dim() not in (2, 3, 4):
        raise Unsupported("no BatchNorm3d")
    own = getattr(module, type(layer).__name__)(
        layer.num_features, act_func="relu" if "relu" in case.op else None, device=x.device
    )
    own.train(layer.training)
    own.__dict__["_parameters"], own.__dict__["_buffers"] = layer._parameters, layer._buffers
    run: Norm = own
    return run


def apex(layer: Any, case: Case, x: Tensor) -> Norm:
    group: Any = importlib.import_module("apex.contrib.groupbn")
    if case.layout != "channels_last" or x.dim() != 4 or case.dtype != "float16":
        raise Unsupported("float16 and channels_last only")
    own = group.BatchNorm2d_NHWC(layer.num_features, fuse_relu="relu" in case.op)
    own.to(x.device).train(layer.training)
    own.__dict__["_parameters"] = layer._parameters
    own.running_mean, own.running_var = layer.running_mean, layer.running_var

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        rows = None if residual is None else residual.permute(0, 2, 3, 1)
        y: Tensor = own(x.permute(0, 2, 3, 1), rows)
        return y.permute(0, 3, 1, 2)

    return run


def inplace_abn(layer: Any, case: Case, x: Tensor) -> Norm:
    module: Any = importlib.import_module("inplace_abn")

    def norm(x: Tensor) -> Tensor:
        y: Tensor = module.inplace_abn(
            x, layer.weight, layer.bias, layer.running_mean, layer.running_var,
            layer.training, layer.momentum, layer.eps, "identity",
        )  # fmt: skip
        return y

    if case.op != "bn":
        raise Unsupported("a ReLU cannot be inverted")
    return followed(norm, case)


#: In each case, all that can take it are timed in turn, in one run.
PROVIDERS = (
    Provider("triton_bn", ours, converted),
    *(
        Provider(f"triton_bn {driver}", ours, inside=partial(planned, partial(of_driver, driver)))
        for driver in DRIVERS
    ),
    Provider("torch native", stock, inside=without_cudnn),
    Provider("torch cuDNN", cudnn),
    Provider("torch", network=lambda model: model),
    Provider("torch.compile", compiled, compiled_network, compiles=True),
    Provider(
        "triton_bn + compile",
        network=lambda model: compiled_network(converted(model)),
        compiles=True,
    ),
    Provider("flag_gems", flag_gems, module="flag_gems"),
    Provider("attorch", attorch, module="attorch"),
    Provider("apex", apex, module="apex"),
    Provider("inplace_abn", inplace_abn, module="inplace_abn", in_place=True),
)


def available(providers: Sequence[Provider] = PROVIDERS) -> dict[str, str]:
    """Those that can be imported here, with the version of each that is another project."""
    found = {}
    for provider in providers:
        if provider.module is None:
            found[provider.name] = ""
            continue
        # An extension built for another torch fails with anything.
        with suppress(Exception):
            found[provider.name] = version(importlib.import_module(provider.module))
    return found


def version(module: Any) -> str:
    """A module's version, and the commit where it was installed from a repository."""
    name = module.__name__
    found = str(getattr(module, "__version__", ""))
    with suppress(metadata.PackageNotFoundError):
        distribution = metadata.distribution(name)
        found = found or distribution.version
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", "")
        found += f" ({commit[:8]})" if commit else ""
    return found or "unknown"
