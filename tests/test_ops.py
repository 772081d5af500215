"""The layers among PyTorch's other parts: operators, derivatives of every kind, transforms, modes, subclasses.

What is compared with PyTorch's own layer is in float64, where it agrees to all digits that matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import hypothesis.strategies as st
import oracle
import pytest
import torch
import torch.autograd.forward_ad as fwad
from hypothesis import HealthCheck, example, given, settings
from oracle import Path
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)  # fmt: skip
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import triton_bn
from triton_bn import Activation
from triton_bn.functional import batch_norm

path = oracle.path

OPS = torch.ops.triton_bn
#: torch.jit.script warns that it is deprecated, also where forward-mode AD first uses it.
SCRIPT_WARNS = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


class Stock(nn.BatchNorm2d):
    """PyTorch's layer, with what ours has behind it in PyTorch's operators."""

    activation: Activation | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        return oracle.activate(y if residual is None else y + residual, self.activation)


def twins(
    device: torch.device | str = "cpu", activation: str | None = None, **options: Any
) -> tuple[triton_bn.BatchNorm2d, Stock]:
    """Our layer of 3 channels and PyTorch's, of the same parameters and statistics."""
    options = {"dtype": torch.float64, "device": device} | options
    stock = Stock(3, **options)
    stock.activation = Activation.of(activation)
    state = {name: randn(3, seed=10 + i) for i, name in enumerate(stock.state_dict())}
    state["running_var"] = 0.5 + randn(3).square()
    state["num_batches_tracked"] = torch.tensor(4)
    ours = triton_bn.BatchNorm2d(3, **options, activation=activation)
    for layer in (ours, stock):
        for name, tensor in layer.state_dict().items():
            tensor.copy_(state[name])
    return ours, stock


def assert_close(got: Any, want: Any, roundings: float = 2**12) -> None:
    """Equal but for so many roundings of the largest value."""
    if isinstance(got, Tensor) and got.is_floating_point():
        got, want = got.detach(), want.detach()
        bound = (
            roundings * torch.finfo(got.dtype).eps * float(want.abs().amax())
            if want.numel()
            else 0.0
        )
        torch.testing.assert_close(got, want, rtol=0, atol=bound)
    elif isinstance(got, (tuple, list)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, roundings)
    elif isinstance(got, dict):
        assert got.keys() == want.keys()
        for name, one in got.items():
            assert_close(one, want[name], roundings)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def assert_same_error(ours: Callable[[], Any], stock: Callable[[], Any], words: str) -> None:
    """Both raise, the same type, with these words."""
    with pytest.raises(Exception, match=words) as theirs:
        stock()
    with pytest.raises(theirs.type, match=words):
        ours()


# The registered operators.


def _forward_case(
    device: torch.device,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    present: Sequence[str] = (
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ),
    residual: bool = False,
    momentum: float | None = 0.1,
    activation: str | None = None,
    bits: bool = False,
    masked: bool = False,
) -> tuple[Any, ...]:
    """Arguments of ``triton_bn::forward``; images are channels_last."""
    x = randn(*(shape or (6, 3)), dtype=dtype).to(device)
    if shape:
        x = x.to(memory_format=torch.channels_last)
    tensors = {
        "weight": randn(3, seed=1).float(),
        "bias": randn(3, seed=2).float(),
        "running_mean": randn(3, seed=3).float(),
        "running_var": randn(3, seed=4).square().float(),
        "num_batches_tracked": torch.tensor(2),
    }
    given_ = [t.to(device) if name in present else None for name, t in tensors.items()]
    added = x.flip(0) if residual else None
    for t in (x, *given_[:2], added):
        if t is not None:
            t.requires_grad_()
    mask = (x[:, 0] > -0.5).detach() if masked else None
    return x, *given_, added, momentum, 1e-5, activation, None, bits, None, False, mask


def _normalize_case(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    """Arguments of ``triton_bn::normalize``."""
    x, weight, bias, mean, variance, _, residual, _, eps, *activation, _, _, mask = _forward_case(
        *arguments, **options
    )
    return x, mean, variance, weight, bias, residual, eps, *activation, mask


def _backward_case(*arguments: Any, training: bool, **options: Any) -> tuple[Any, ...]:
    """Arguments of ``triton_bn::backward`` after a training step or one in eval with frozen parameters."""
    forward = [
        t.detach() if isinstance(t, Tensor) else t
        for t in _forward_case(*arguments, **options, residual=True)
    ]
    x, weight, bias, *_, residual, _, _, activation, parameter, bits, _, _, mask = forward
    y, stats, packed = OPS.forward(*forward)
    return (
        torch.sin(y), x if training else None, stats, weight, bias, None if bits else residual,
        packed if bits else None, activation, parameter, training, (True, training, training, True), None,
        mask,
    )  # fmt: skip


IMAGES = (4, 3, 5, 3)
OPERATORS: dict[str, tuple[Any, Callable[[torch.device], tuple[Any, ...]]]] = {
    "forward of x alone": (OPS.forward.default, partial(_forward_case, present=())),
    "forward, kept slopes": (
        OPS.forward.default,
        lambda d: _forward_case(d, *IMAGES, activation="relu", bits=True, residual=True),
    ),
    "forward, cumulative": (
        OPS.forward.default,
        lambda d: _forward_case(
            d, dtype=torch.float16, momentum=None, activation="silu",
            present=("bias", "running_mean", "running_var", "num_batches_tracked"),
        ),
    ),
    "forward with a mask": (OPS.forward.default, partial(_forward_case, masked=True, activation="silu")),
    "normalize with a mask": (OPS.normalize.default, partial(_normalize_case, masked=True)),
    "backward with a mask": (
        OPS.backward.default, partial(_backward_case, training=True, masked=True, activation="silu"),
    ),
    "normalize": (OPS.normalize.default, partial(_normalize_case, activation="gelu")),
    "normalize, kept slopes": (
        OPS.normalize.default,
        lambda d: _normalize_case(d, *IMAGES, activation="relu6", bits=True, residual=True),
    ),
    "backward": (OPS.backward.default, partial(_backward_case, training=True, activation="silu")),
    "backward, kept slopes": (
        OPS.backward.default,
        lambda d: _backward_case(d, *IMAGES, training=True, activation="relu", bits=True),
    ),
    "backward, x not kept": (
        OPS.backward.default,
        lambda d: _backward_case(d, *IMAGES, training=False, activation="relu", bits=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("operator", "arguments"), OPERATORS.values(), ids=OPERATORS)
def test_each_operator_is_what_it_declares(
    path: Path, operator: Any, arguments: Callable[[torch.device], tuple[Any, ...]]
) -> None:
    """Its schema's mutations, its fake outputs (dynamic shapes too) and its gradient under AOT autograd."""
    torch.library.opcheck(operator, arguments(path.device))


# Derivatives of derivatives.


def _second(
    y: Tensor, dy: Tensor, leaves: list[Tensor], probes: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients, and those of a random sum of them, by dy too."""
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    total = sum((g * p).sum() for g, p in zip(first, probes, strict=True))
    second = torch.autograd.grad(total, [*leaves, dy], materialize_grads=True)
    return list(first), list(second)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    needs=st.sets(st.sampled_from(["x", "weight", "bias", "residual"]), min_size=1),
    training=st.booleans(),
    activation=st.sampled_from([None, "relu", "gelu", "hardswish"]),
    residual=st.sampled_from(["none", "own", "x"]),
    layouts=st.tuples(
        *[st.sampled_from(["contiguous", "channels_last", "cropped", "transposed"])] * 2
    ),
    affine=st.booleans(),
)
@example(
    {"x"}, False, "relu", "none", ("channels_last", "contiguous"), True
)  # frozen: x is not kept
@example({"x", "residual"}, False, "relu", "own", ("channels_last", "contiguous"), True)
@example(
    {"bias", "residual"}, True, "relu", "own", ("contiguous", "contiguous"), True
)  # kept slopes
@example({"x", "weight"}, True, "relu", "x", ("contiguous", "contiguous"), True)
def test_second_derivatives_by_any_subset(
    path: Path,
    needs: set[str],
    training: bool,
    activation: str | None,
    residual: str,
    layouts: tuple[str, str],
    affine: bool,
) -> None:
    shape = (3, 2, 4, 3)
    tensors = {"x": oracle.arrange(randn(*shape), layouts[0]).to(path.device)}
    if affine:
        tensors |= {"weight": randn(2, seed=1), "bias": randn(2, seed=2)}
    if residual == "own":
        tensors["residual"] = randn(*shape, seed=3)
    tensors = {name: t.to(path.device).requires_grad_(name in needs) for name, t in tensors.items()}
    leaves = [t for t in tensors.values() if t.requires_grad]
    if not leaves:
        return
    x, weight, bias = (tensors.get(name) for name in ("x", "weight", "bias"))
    added = x if residual == "x" else tensors.get("residual")
    dy = oracle.arrange(randn(*shape, seed=4), layouts[1]).to(path.device).requires_grad_()
    probes = [randn(*t.shape, seed=5 + i).to(path.device) for i, t in enumerate(leaves)]
    running = randn(2, seed=8).to(path.device), randn(2, seed=9).to(path.device).square() + 0.5

    ours = batch_norm(
        x,
        *(t.clone() for t in running),
        weight,
        bias,
        training,
        residual=added,
        activation=activation,
    )
    theirs = nn.functional.batch_norm(x, *(t.clone() for t in running), weight, bias, training)
    theirs = oracle.activate(theirs if added is None else theirs + added, Activation.of(activation))
    got, want = (_second(y, dy, leaves, probes) for y in (ours, theirs))
    assert_close(got, want)


@pytest.mark.parametrize(
    ("training", "activation", "residual"), [(True, "relu", True), (False, "mish", False)]
)
def test_gradgradcheck(path: Path, training: bool, activation: str, residual: bool) -> None:
    layer, _ = twins(path.device, activation, track_running_stats=not training)
    layer.train(training)
    leaves = [randn(3, 3, 2, 1).to(path.device), layer.weight.detach(), layer.bias.detach()]
    leaves += [randn(3, 3, 2, 1, seed=1).to(path.device)] * residual

    def call(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, *residual))

    assert gradgradcheck(call, [t.requires_grad_() for t in leaves], fast_mode=True)


def test_third_derivatives(path: Path) -> None:
    """Those of the formula: PyTorch's own batch norm, right twice, is wrong from the third on."""
    layer, _ = twins(path.device, "silu")

    def formula(x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        y = centred / (centred.square().mean((0, 2, 3), keepdim=True) + layer.eps).sqrt()
        return nn.functional.silu(y * layer.weight[:, None, None] + layer.bias[:, None, None])

    results = []
    for f in (layer, formula):
        x = randn(4, 3, 2, 2).to(path.device).requires_grad_()
        derivative = f(x)
        for order in range(3):
            (derivative,) = torch.autograd.grad(derivative.pow(2).sum(), x, create_graph=order < 2)
        results.append(derivative)
    assert_close(*results)


def test_a_gradient_penalty_in_16_bit(path: Path) -> None:
    """Parameters in float32: gradients have the dtypes of their tensors, and bfloat16's digits."""
    results = []
    for layer in twins(path.device, "silu", dtype=torch.float32):
        x = randn(6, 3, 4, 4, dtype=torch.bfloat16).to(path.device).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
        dx.float().square().sum().backward()
        assert (dx.dtype, x.grad.dtype, layer.weight.grad.dtype) == (
            x.dtype,
            x.dtype,
            torch.float32,
        )
        results.append([x.grad.float(), layer.weight.grad])
    ulps = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    assert_close(*results, roundings=8 * ulps)


# Forward mode, and many gradients at once.


@SCRIPT_WARNS
@MODES
def test_forward_mode(path: Path, training: bool) -> None:
    layer, _ = twins(path.device, "elu")
    layer.train(training)
    leaves = [
        randn(3, 3, 2, 1),
        layer.weight.detach(),
        layer.bias.detach(),
        randn(3, 3, 2, 1, seed=1),
    ]

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    leaves = [t.to(path.device).requires_grad_() for t in leaves]
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    assert (layer.num_batches_tracked > 4) == training


FROZEN = pytest.mark.parametrize(
    ("training", "frozen"),
    [(True, False), (False, False), (False, True)],
    ids=["training", "eval", "frozen"],
)


def _results_for(
    path: Path, training: bool, frozen: bool, gradients: Callable[[Tensor, list[Tensor]], Any]
) -> list[Any]:
    """``gradients(y, leaves)`` of our layer with its kept slopes, and of PyTorch's."""
    results = []
    for layer in twins(path.device, "relu"):
        layer.train(training).requires_grad_(not frozen)
        x, residual = (randn(4, 3, 2, 5, seed=i).to(path.device) for i in range(2))
        x = x.to(memory_format=torch.channels_last).requires_grad_()  # y's gradients are contiguous
        residual.requires_grad_()
        results.append(
            gradients(layer(x, residual), [x, residual, *layer.parameters()][: 2 if frozen else 4])
        )
    return results


@SCRIPT_WARNS
@FROZEN
def test_a_tangent_passes_backward(path: Path, training: bool, frozen: bool) -> None:
    """The forward knows nothing of it: y's gradient is the first to have one."""
    dy, tangent = (randn(4, 3, 2, 5, seed=i).to(path.device) for i in (2, 3))

    def gradients(y: Tensor, leaves: list[Tensor]) -> list[Any]:
        with fwad.dual_level():
            found = torch.autograd.grad(y, leaves, fwad.make_dual(dy, tangent))
            return [tuple(fwad.unpack_dual(g)) for g in found]

    assert_close(*_results_for(path, training, frozen, gradients))


@FROZEN
def test_many_gradients_at_once(path: Path, training: bool, frozen: bool) -> None:
    dy = randn(3, 4, 3, 2, 5, seed=2).to(path.device)
    assert_close(*_results_for(path, training, frozen, partial(_batched, dy)))


def _batched(dy: Tensor, y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    found = torch.autograd.grad(y, leaves, dy, is_grads_batched=True)
    assert not any(g.requires_grad for g in found)
    return found


def test_vectorized_jacobian(path: Path) -> None:
    x = randn(2, 3, 2, 1).to(path.device)
    assert_close(
        *(
            torch.autograd.functional.jacobian(layer, x, vectorize=True)
            for layer in twins(path.device, "gelu", track_running_stats=False)
        )
    )


# torch.func.

_TANGENT = randn(2, 3, 2, 1, seed=1)


def _sum_of_cubes(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return f(x).pow(3).sum()


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "grad": lambda f, x: grad(partial(_sum_of_cubes, f))(x),
    "vjp": lambda f, x: [(y, pull(_TANGENT.to(x.device))) for y, pull in [vjp(f, x)]],
    "jvp": lambda f, x: jvp(f, (x,), (_TANGENT.to(x.device),)),
    "linearize": lambda f, x: [(y, push(_TANGENT.to(x.device))) for y, push in [linearize(f, x)]],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(partial(_sum_of_cubes, f))(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x + 1, x * x])),
    "vmap(grad)": lambda f, x: vmap(grad(partial(_sum_of_cubes, f)))(torch.stack([x, x * x])),
    "grad in x and residual": lambda f, x: grad(lambda t: f(t, t).pow(3).sum())(x),
}


@pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr Node:UserWarning"
)  # linearize's own
@SCRIPT_WARNS
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@MODES
def test_transforms(
    device: torch.device, transform: Callable[[Callable[..., Tensor], Tensor], Any], training: bool
) -> None:
    results = []
    for layer in twins(device, "silu", track_running_stats=not training):
        layer.train(training)
        results.append(transform(layer, randn(2, 3, 2, 1).to(device)))
    assert_close(*results)


def test_per_sample_gradients_in_eval(device: torch.device) -> None:
    x = randn(4, 3, 2, 2).to(device)
    results = []
    for layer in twins(device, "relu"):
        layer.eval()

        def loss(parameters: dict[str, Tensor], sample: Tensor, layer: nn.Module = layer) -> Tensor:
            return functional_call(layer, parameters, (sample[None],)).square().sum()

        results.append(vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x))
    assert_close(*results)


def test_an_ensemble_under_vmap_advances_statistics_of_its_own(device: torch.device) -> None:
    x = randn(2, 4, 3, 2, 2).to(device)
    results = []
    for ours in (0, 1):
        models = [twins(device, "relu")[ours] for _ in range(2)]
        with torch.no_grad():
            models[1].weight.mul_(2)
            models[1].running_mean.add_(1)
        parameters, buffers = stack_module_state(models)

        def call(parameters: Any, buffers: Any, x: Tensor, model: nn.Module = models[0]) -> Tensor:
            return functional_call(model, (parameters, buffers), (x,))

        results.append((vmap(call)(parameters, buffers, x), buffers))
        assert buffers["num_batches_tracked"].tolist() == [5, 5]
    assert_close(*results)


def test_functional_call_advances_the_statistics_it_was_given(path: Path) -> None:
    x = randn(4, 3, 2, 2).to(path.device)
    results = []
    for layer in twins(path.device):
        state = {name: t.detach() + 1 for name, t in layer.state_dict().items()}
        y = functional_call(layer, state, (x,))
        assert layer.num_batches_tracked == 4
        results.append((y, state))
    assert_close(*results)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda layer, x: vmap(layer)(x[None]), "running_mean or running_var"),
        (lambda layer, x: grad(partial(_sum_of_cubes, layer))(x), "would mutate a captured Tensor"),
        (lambda layer, x: jvp(layer, (x,), (x,)), "would mutate a captured Tensor"),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_statistics_that_a_transform_cannot_advance_are_pytorchs_error(
    device: torch.device, transform: Callable[[nn.Module, Tensor], Any], words: str
) -> None:
    ours, stock = twins(device)
    x = randn(4, 3, 2, 2).to(device)
    assert_same_error(lambda: transform(ours, x), lambda: transform(stock, x), words)


# What is kept between forward and backward.


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_under_checkpointing_advance_as_pytorchs(
    path: Path, reentrant: bool, momentum: float | None
) -> None:
    results = []
    for layer in twins(path.device, "relu", momentum=momentum):
        x, residual = (randn(4, 3, 2, 5, seed=i).to(path.device).requires_grad_() for i in range(2))
        y = checkpoint(layer, x, residual, use_reentrant=reentrant)
        before = {name: t.clone() for name, t in layer.named_buffers()}
        y.pow(3).sum().backward()
        after = dict(layer.named_buffers())
        assert (before["num_batches_tracked"], after["num_batches_tracked"]) == (5, 6)
        results.append((y, before, after, x.grad, residual.grad, layer.weight.grad))
    assert_close(*results)


def test_selective_checkpointing_may_keep_the_operators_results(path: Path) -> None:
    """Then the forward is not run again, and the statistics advance once."""
    layer, stock = twins(path.device, "relu")
    x = randn(4, 3, 2, 5).to(path.device).requires_grad_()
    context = partial(create_selective_checkpoint_contexts, [OPS.forward.default])
    y = checkpoint(layer, x, use_reentrant=False, context_fn=context)
    y.pow(3).sum().backward()
    assert layer.num_batches_tracked == 5
    twin = x.detach().clone().requires_grad_()
    stock(twin).pow(3).sum().backward()
    assert_close([x.grad, *layer.buffers()], [twin.grad, *stock.buffers()])


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_hooks_carry_what_is_kept_for_backward(path: Path, activation: str | None) -> None:
    packed: list[Tensor] = []

    def pack(t: Tensor) -> tuple[str, Tensor]:
        packed.append(t)
        return "packed", t.clone()

    def unpack(box: tuple[str, Tensor]) -> Tensor:
        assert box[0] == "packed"
        return box[1]

    results = []
    for hooks in (
        nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
        torch.autograd.graph.save_on_cpu(),
    ):
        layer, _ = twins(path.device, activation)
        x, residual = (randn(4, 3, 2, 5, seed=i).to(path.device).requires_grad_() for i in range(2))
        with hooks:
            y = layer(x, residual)
        y.pow(3).sum().backward()
        results.append((x.grad, residual.grad, layer.weight.grad, layer.bias.grad))
    assert any(t.shape == x.shape for t in packed)
    assert_close(results[1], results[0], roundings=0)
    assert_close(results[2], results[0], roundings=0)


# Modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_advance_where_no_gradient_is_recorded(
    path: Path, mode: Callable[[], Any]
) -> None:
    x = randn(4, 3, 2, 5).to(path.device)
    results = []
    for layer in twins(path.device, "relu"):
        with mode():
            y = layer(x, x)
        assert not y.requires_grad
        assert y.is_inference() == (mode is torch.inference_mode)
        results.append((y, dict(layer.named_buffers())))
        layer(x).sum().backward()  # and the layer goes on as ever
    assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype_alone_as_pytorch_does(path: Path, dtype: torch.dtype) -> None:
    results = []
    for layer in twins(path.device, "relu", dtype=torch.float32):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), layer).to(path.device)
        x = randn(4, 3, 2, 5, dtype=torch.float32).to(path.device)
        with torch.autocast(path.device.type, dtype):
            y = net(x)
            assert layer(x).dtype == torch.float32
            assert layer(x.to(dtype), x.to(dtype)).dtype == dtype
        assert y.dtype == dtype
        y.float().square().sum().backward()
        gradients = [p.grad for p in net.parameters()]
        assert {g.dtype for g in gradients} == {torch.float32}
        results.append([y.float(), *gradients])
    ulps = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_close(*results, roundings=8 * ulps)


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels"])
@MODES
def test_tensors_without_data_get_the_shapes_and_layouts_of_real_ones(
    device: torch.device, mode: str, layout: str, training: bool
) -> None:
    def run(device: torch.device | str) -> list[tuple[Any, ...]]:
        layer, _ = twins(device, "relu")
        layer.train(training)
        with torch.no_grad():
            x = oracle.arrange(randn(4, 3, 2, 5), layout)
            x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        if torch.device(device).type != "meta":
            x.data.copy_(randn(4, 3, 2, 5))
        residual = torch.ones_like(x).requires_grad_()
        y = layer(x.requires_grad_(), residual)
        y.sum().backward()
        results = [y, x.grad, residual.grad, layer.weight.grad, *layer.buffers()]
        return [(t.shape, t.stride(), t.dtype, t.device) for t in results]

    real = run(device)
    if mode == "fake":
        with FakeTensorMode():
            assert run(device) == real
    else:
        assert [r[:3] for r in run("meta")] == [r[:3] for r in real]


class Seen(TorchDispatchMode):
    """Writes down the operators that go by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@MODES
def test_a_dispatch_mode_sees_one_operator_forward_and_one_backward(
    path: Path, training: bool
) -> None:
    results = []
    for seen in (Seen(), nullcontext()):
        layer, _ = twins(path.device, "relu")
        layer.train(training)
        x = randn(4, 3, 2, 5).to(path.device).requires_grad_()
        dy = randn(4, 3, 2, 5, seed=1).to(path.device)
        with seen:
            (dx,) = torch.autograd.grad(layer(x), x, dy)
        results.append((dx, dict(layer.named_buffers())))
        if isinstance(seen, Seen):
            ours = [name for name in seen.names if name.startswith("triton_bn")]
            forward = "forward" if training else "normalize"
            assert ours == [f"triton_bn.{forward}.default", "triton_bn.backward.default"]
            assert not any("batch_norm" in name for name in seen.names)
    assert_close(*results, roundings=0)


def test_make_fx_traces_the_operators(device: torch.device) -> None:
    layer, _ = twins(device, "relu")
    layer.eval()
    x = randn(4, 3, 2, 5).to(device)
    graph = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    assert any(node.target is OPS.normalize.default for node in graph.graph.nodes)
    assert_close(graph(x + 1), layer(x + 1), roundings=0)


# Tensors that are more than tensors.


class Tagged(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("place", ["input", "weight", "residual"])
def test_a_subclass_comes_out_where_one_goes_in(path: Path, place: str) -> None:
    results = []
    for layer in twins(path.device, "relu"):
        x, residual = (randn(4, 3, 2, 5, seed=i).to(path.device) for i in range(2))
        if place == "weight":
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))
        else:
            x, residual = (
                t.as_subclass(Tagged) if name == place else t
                for name, t in (("input", x), ("residual", residual))
            )
        y = layer(x, residual)
        assert type(y) is Tagged
        results.append(y.as_subclass(Tensor))
    assert_close(*results, roundings=0)


@pytest.mark.parametrize("place", ["input", "weight", "residual", "all"])
@MODES
def test_a_tensor_that_wraps_others_may_stand_in_any_place(
    path: Path, place: str, training: bool
) -> None:
    """TwoTensor computes with two tensors at once."""

    def doubled(t: Tensor) -> TwoTensor:
        return TwoTensor(t.detach().clone(), t.detach() * 2)

    results = []
    for layer in twins(path.device, "relu"):
        layer.train(training).requires_grad_(False)
        x, residual = (randn(4, 3, 2, 5, seed=i).to(path.device) for i in range(2))
        x = doubled(x) if place in ("input", "all") else x
        residual = doubled(residual) if place in ("residual", "all") else residual
        if place in ("weight", "all"):
            layer.weight = nn.Parameter(doubled(layer.weight))
        if place == "all":
            layer.bias = nn.Parameter(doubled(layer.bias))
            for name, buffer in list(layer.named_buffers()):
                setattr(layer, name, doubled(buffer))
        y = layer(x.requires_grad_(), residual)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
        assert type(y) is TwoTensor
        results.append(
            [
                t
                for pair in (y, dx, *layer.buffers())
                if type(pair) is TwoTensor
                for t in (pair.a, pair.b)
            ]
        )
    assert_close(*results)


# What wraps a layer.


class Positive(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return nn.functional.softplus(t)


def test_a_parametrized_weight_gets_its_gradient(path: Path) -> None:
    results = []
    for layer in twins(path.device, "relu"):
        parametrize.register_parametrization(layer, "weight", Positive())
        y = layer(randn(4, 3, 2, 5).to(path.device))
        y.pow(3).sum().backward()
        results.append((y, layer.parametrizations.weight.original.grad))
        parametrize.remove_parametrizations(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)
    assert_close(*results)


def test_swa_takes_the_statistics_anew(path: Path) -> None:
    batches = [randn(4, 3, 2, 5, seed=i).to(path.device) for i in range(3)]
    results = []
    for layer in twins(path.device, "relu"):
        averaged = AveragedModel(nn.Sequential(layer))
        with torch.no_grad():
            layer.weight.mul_(3)
        averaged.update_parameters(nn.Sequential(layer))
        update_bn(batches, averaged)
        twin = averaged.module[0]
        assert (twin.momentum, twin.num_batches_tracked) == (0.1, 3)
        results.append(twin.state_dict())
    assert_close(*results)


@SCRIPT_WARNS
@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.Sequential], ids=["layer", "model"])
def test_torch_jit_script_is_refused_with_a_way_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"triton_bn.revert\(model\)"):
        torch.jit.script(wrap(twins()[0]))


@MODES
def test_torch_jit_trace_records_what_pytorchs_layer_records(
    device: torch.device, training: bool
) -> None:
    """And warns where that warns: in training, of the check for more than one value a channel."""
    results = []
    for layer in twins(device, "relu"):
        layer.train(training)
        x, residual = (randn(4, 3, 2, 5, seed=i).to(device) for i in range(2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            traced = torch.jit.trace(layer, (x, residual), check_trace=False)
        traced_warnings = sorted(
            str(w.message) for w in caught if w.category is torch.jit.TracerWarning
        )
        y = traced(x[:2] + 1, residual[:2])
        results.append((len(traced_warnings), y, dict(layer.named_buffers())))
        assert len(traced_warnings) == training
        assert not y.isnan().any()
    assert_close(*results)
