"""What is to be normalized: the canonical view of an input, the activation, and the errors at the boundary.

Batch normalization does not care in which order the values of a channel come. So every dense
tensor, whatever its memory format, is one row-major block ``[outer, channels, inner]``: ``outer``
collects the dimensions that lie outside the channel dimension in memory, ``inner`` those inside.

=====================  =====================  =======================
memory format          shape                  (outer, channels, inner)
=====================  =====================  =======================
contiguous             (N, C)                 (N, C, 1)
contiguous             (N, C, H, W)           (N, C, H*W)
channels_last          (N, C, H, W)           (N*H*W, C, 1)
channels_last_3d       (N, C, D, H, W)        (N*D*H*W, C, 1)
``x.transpose(0, 1)``  (N, C, H, W)           (1, C, N*H*W)
=====================  =====================  =======================

The kernels see nothing but that block. A sliced input has the same block with strides of its own;
what is allocated for it (output, gradients) is dense.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Problem",
    "aligned_like",
    "canonical",
    "check",
    "describe",
    "gradient_of",
    "require_module",
    "require_tensor",
]

#: Every activation by name, with its parameter's default where it takes one.
ACTIVATIONS: dict[str, float | None] = {
    "relu": None,
    "relu6": None,
    "leaky_relu": 0.01,
    "silu": None,
    "hardswish": None,
    "gelu": None,
    "elu": 1.0,
    "mish": None,
    "sigmoid": None,
    "tanh": None,
}

#: Activations whose derivative takes two values only, so that one bit a value says which.
_TWO_SLOPES = frozenset({"relu", "relu6", "leaky_relu"})

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def hash_once(self: Any) -> int:
    """``__hash__`` of a frozen dataclass that is looked up at every call: computed at the first."""
    value: int | None = self.__dict__.get("_hash")
    if value is None:
        value = hash(tuple(getattr(self, f.name) for f in fields(self) if f.compare))
        object.__setattr__(self, "_hash", value)
    return value


def without_hash(self: Any) -> dict[str, Any]:
    """``__getstate__`` beside :func:`hash_once`: another process has other hashes."""
    return {name: value for name, value in self.__dict__.items() if name != "_hash"}


@dataclass(frozen=True)
class Activation:
    """An activation behind the normalization, as ``torch.nn.functional`` defines it; for one without a
    parameter its name is enough: ``activation="relu"``.

    ==============  ==========================================  ====================
    name            of z                                        parameter (default)
    ==============  ==========================================  ====================
    ``relu``        max(z, 0)
    ``relu6``       min(max(z, 0), 6)
    ``leaky_relu``  z where z > 0, else slope · z               negative_slope (0.01)
    ``silu``        z · σ(z)
    ``hardswish``   z · min(max(z + 3, 0), 6) / 6
    ``gelu``        z · Φ(z), Φ the normal distribution's
    ``elu``         z where z > 0, else α · (exp(z) − 1)        alpha (1.0)
    ``mish``        z · tanh(log(1 + exp(z)))
    ``sigmoid``     σ(z) = 1 / (1 + exp(−z))
    ``tanh``        tanh(z)
    ==============  ==========================================  ====================

    Args:
        name: One of the above.
        parameter: ``negative_slope`` of ``"leaky_relu"``, ``alpha`` of ``"elu"``; ``None`` takes
            PyTorch's default. The others take none.

    Raises:
        ValueError: for a name that is not known, or a parameter that the activation does not take.

    Example:
        >>> import triton_bn
        >>> bn = triton_bn.BatchNorm2d(64, activation=triton_bn.Activation("leaky_relu", 0.2))
        >>> print(bn.activation)
        leaky_relu(0.2)
    """

    name: str
    parameter: float | None = None

    __hash__ = hash_once
    __getstate__ = without_hash

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(
                f"activation must be None or one of {', '.join(map(repr, ACTIVATIONS))}, but got "
                f"{self.name!r}{_meant(self.name)}"
            )
        default = ACTIVATIONS[self.name]
        if default is None and self.parameter is not None:
            raise ValueError(
                f"activation {self.name!r} takes no parameter, but got {self.parameter}"
            )
        value = default if self.parameter is None else float(self.parameter)
        object.__setattr__(self, "parameter", value)

    @classmethod
    def of(cls, activation: str | Activation | None) -> Activation | None:
        """The activation meant by a user's argument: its name, an :class:`Activation`, or ``None``."""
        if activation is None or isinstance(activation, Activation):
            return activation
        if not isinstance(activation, str):
            # A module, its class, or a function of torch.nn.functional
            raise ValueError(
                "activation must be None, a name or a triton_bn.Activation, but got "
                f"{activation!r}{_meant(getattr(activation, '__name__', type(activation).__name__))}"
            )
        return _named(activation)

    @property
    def two_slopes(self) -> bool:
        """Whether one bit a value is all that the derivative needs."""
        return self.name in _TWO_SLOPES

    @property
    def output_tells(self) -> bool:
        """Whether the output tells which of two slopes it is."""
        return self.two_slopes and (self.parameter is None or self.parameter > 0)

    def __str__(self) -> str:
        return self.name if self.parameter is None else f"{self.name}({self.parameter:g})"


def _meant(name: Any) -> str:
    """What somebody may have meant who wrote ``"ReLU"`` or ``nn.LeakyReLU(0.2)``, as the end of an error."""
    known = {"swish": "silu"} | {each.replace("_", ""): each for each in ACTIVATIONS}
    meant = known.get(re.sub("[^a-z0-9]", "", str(name).lower()))
    if meant is None:
        return ""
    if ACTIVATIONS[meant] is None:
        return f': write activation="{meant}"'
    return f': write activation="{meant}", or triton_bn.Activation("{meant}", parameter)'


@cache
def _named(name: str) -> Activation:
    return Activation(name)


@dataclass(frozen=True)
class Problem:
    """One batch normalization as the kernels see it, in one direction. Hashable: plans are kept by it.

    ``outer``, ``channels`` and ``inner`` are the canonical sizes (see the module's docstring) and
    ``strides`` those of the input in values; everything else is dense, so row-major.
    """

    direction: Literal["forward", "backward"]
    outer: int
    channels: int
    inner: int
    strides: tuple[int, int, int]
    dtype: torch.dtype
    #: Adjacent values that one 16-byte access may take: a power of two.
    vector: int = 1
    #: Batch statistics (training) or running statistics (evaluation).
    training: bool = True
    activation: Activation | None = None
    residual: bool = False
    #: The derivative of the activation is kept as one bit a value.
    bits: bool = False
    #: ``momentum=None``: the running statistics are the cumulative average of all batches.
    cumulative: bool = False
    #: Backward reads y, which tells the activation's slope.
    output: bool = False
    #: A mask says which values take part.
    masked: bool = False

    __hash__ = hash_once
    __getstate__ = without_hash

    @property
    def count(self) -> int:
        """Values a channel: M of the formulas."""
        return self.outer * self.inner

    @property
    def row(self) -> int:
        """Values a dense row of the canonical block: ``channels * inner``."""
        return self.channels * self.inner

    @property
    def numel(self) -> int:
        return self.outer * self.row

    @property
    def dense(self) -> bool:
        return self.strides == (self.row, self.inner, 1)

    @property
    def wide(self) -> bool:
        """Whether an offset may pass 2**31 - 1 values, so that it must be computed in int64.

        A tile may reach past the last row before its mask is applied, hence the margin.
        """
        reach = sum(
            (size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True)
        )
        return max(reach, self.numel) >= 2**31 - 2**24

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.outer, self.channels, self.inner

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def __str__(self) -> str:
        parts = [f"{self.outer}x{self.channels}x{self.inner}", _name(self.dtype)]
        if not self.dense:
            parts.append(f"strides {self.strides}")
        if self.vector * self.itemsize < 16:
            parts.append(f"vector {self.vector}")
        if self.residual:
            parts.append("add")
        if self.activation is not None:
            parts.append(str(self.activation))
        parts += [n for n in ("bits", "cumulative", "output", "masked") if getattr(self, n)]
        mode = "training" if self.training else "eval"
        return f"{self.direction} {mode} " + " ".join(parts)


@lru_cache(maxsize=4096)
def canonical(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Sizes and strides of the ``[outer, channels, inner]`` view of a tensor, or ``None`` where there is none.

    Args:
        shape: ``(N, C, *)``; the channels are dimension 1.
        strides: the tensor's strides, in values.

    Returns:
        ``((outer, channels, inner), (outer stride, channel stride, inner stride))``; the stride of a
        size of 1 is the one a dense tensor would have. ``None`` for an expanded tensor and for one
        whose outer or inner dimensions have gaps between them (an image cropped in width, say).
    """
    channels = shape[1]
    others = sorted(
        (d for d in range(len(shape)) if d != 1 and shape[d] != 1), key=lambda d: -strides[d]
    )
    if any(strides[d] == 0 for d in others) or (channels != 1 and strides[1] == 0):
        return None
    outside = [d for d in others if channels != 1 and strides[d] > strides[1]]
    inside = others[len(outside) :]

    def collapse(dims: list[int]) -> tuple[int, int] | None:
        for first, second in pairwise(dims):
            if strides[first] != strides[second] * shape[second]:
                return None
        return math.prod(shape[d] for d in dims), strides[dims[-1]] if dims else 0

    outer, inner = collapse(outside), collapse(inside)
    if outer is None or inner is None:
        return None
    inner_stride = inner[1] or 1
    channel_stride = strides[1] if channels != 1 else inner[0] * inner_stride
    outer_stride = outer[1] or channels * channel_stride
    return (outer[0], channels, inner[0]), (outer_stride, channel_stride, inner_stride)


def describe(
    x: Tensor,
    *,
    direction: Literal["forward", "backward"] = "forward",
    training: bool,
    residual: bool = False,
    activation: Activation | None = None,
    bits: bool = False,
    cumulative: bool = False,
    output: bool = False,
    masked: bool = False,
) -> tuple[Problem, Tensor]:
    """The problem of an input (N, C, *), and the input, or its copy where it has no canonical view."""
    flags = (direction, training, residual, activation, bits, cumulative, output, masked)
    problem = _described(x.shape, x.stride(), x.dtype, x.data_ptr() % 16, *flags)
    if problem is None:
        x = torch.empty_like(x).copy_(x)
        problem = _described(x.shape, x.stride(), x.dtype, x.data_ptr() % 16, *flags)
        assert problem is not None, "a dense tensor always has its canonical view"
    return problem, x


@lru_cache(maxsize=4096)
def _described(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    misaligned: int,
    direction: Literal["forward", "backward"],
    training: bool,
    residual: bool,
    activation: Activation | None,
    bits: bool,
    cumulative: bool,
    output: bool,
    masked: bool,
) -> Problem | None:
    view = canonical(tuple(shape), strides)
    if view is None:
        return None
    sizes, steps = view
    row = sizes[1] * sizes[2]
    if steps != (row, sizes[2], 1):
        # Everything else will lie as torch.empty_like(x) does: that must be the same block.
        like = torch.empty_like(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
        dense = canonical(tuple(shape), like.stride())
        if dense is None or dense[0] != sizes:
            return None
    # Adjacent values in 16 bytes, fewer where rows (of x, or of what is dense) or x itself start elsewhere.
    vector = 16 // dtype.itemsize
    pitches = (row, steps[0] if sizes[0] > 1 else 0)
    while vector > 1 and (
        misaligned % (vector * dtype.itemsize) or any(pitch % vector for pitch in pitches)
    ):
        vector //= 2
    return Problem(
        direction, *sizes, steps, dtype, vector, training, activation, residual, bits, cumulative,
        output, masked,
    )  # fmt: skip


def gradient_of(problem: Problem) -> Problem:
    """The backward problem of a forward one, all gradients wanted.

    It knows of a residual only where the activation's slope is recomputed from it: else y or bits tell.
    """
    act = problem.activation
    kept = problem.residual and act is not None and not problem.bits
    output = kept and act is not None and act.output_tells
    return replace(
        problem, direction="backward", residual=kept and not output, output=output, cumulative=False
    )


def aligned_like(tensor: Tensor, dense: Tensor) -> Tensor:
    """``tensor`` in the memory layout of ``dense``, of the same shape: itself, or a copy where it must be.

    The copy is also made of a view that starts off a 16-byte boundary, so that the kernels may read
    all tensors but the input in whole 16-byte accesses.
    """
    same = tensor.stride() == dense.stride() or all(
        size == 1 or a == b
        for size, a, b in zip(tensor.shape, tensor.stride(), dense.stride(), strict=True)
    )
    if same and tensor.data_ptr() % 16 == 0:
        return tensor
    return torch.empty_like(dense, dtype=tensor.dtype).copy_(tensor)


def require_tensor(name: str, value: Any) -> None:
    """Refuses what is no tensor, in PyTorch's words.

    Raises:
        TypeError: with the argument's name and what came.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"batch_norm(): argument '{name}' must be Tensor, not {type(value).__name__}"
        )


def require_module(value: Any) -> None:
    """Refuses what is no module.

    Raises:
        TypeError: with what came.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(value).__name__}")


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Raises what ``torch.nn.functional.batch_norm`` raises for the same arguments, in its words.

    Nothing has been written when it raises.

    Raises:
        ValueError: one value a channel in training; ``eps`` not positive in training or negative; one of
            the running statistics without the other in training.
        RuntimeError: a parameter or buffer of the wrong length, device or dtype; evaluation without
            running statistics.
        NotImplementedError: an input that is not floating point.
        IndexError: an input without a channel dimension.
    """
    shape = input.shape
    if training:
        if input.dim() == 0:
            raise IndexError("list index out of range")
        few = input.dim() < 2 or input.numel() == shape[1]  # known at once, unlike the products
        if few and math.prod(shape[:1]) * math.prod(shape[2:]) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape}"
            )
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if input.numel() == 0:
        return  # F.batch_norm looks at nothing else
    if input.dim() < 2:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-max(input.dim(), 1)}, "
            f"{max(input.dim(), 1) - 1}], but got 1)"
        )
    dtype = input.dtype
    if dtype not in FLOATING:
        raise NotImplementedError(
            f""""batch_norm" not implemented for '{input.type().rpartition(".")[2].removesuffix("Tensor")}'"""
        )
    if not training:
        for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
            if buffer is None:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
    elif (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    channels, device = shape[1], input.device
    shared: torch.dtype | None = None
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor.device != device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} is on {tensor.device}, "
                f"different from the input on {device}"
            )
        own = tensor.dtype
        if own is not shared:
            if own != dtype and (own != torch.float32 or dtype == torch.float64):
                allowed = {_name(dtype), "float64" if dtype == torch.float64 else "float32"}
                raise RuntimeError(
                    f"mixed dtype: expect {name} to have scalar type of {' or '.join(sorted(allowed))} "
                    f"beside an input of {_name(dtype)}, but got {_name(own)}"
                )
            if shared is not None:
                raise RuntimeError(
                    f"mixed dtype: all parameters and buffers must share one scalar type, but {name} has "
                    f"{_name(own)} and another {_name(shared)}"
                )
            shared = own
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is None:
            continue
        if buffer.dim() != 1:
            raise RuntimeError(
                f"{name} should have 1 dimension, but has shape {list(buffer.shape)}"
            )
        if training and channels > 1 and buffer.stride(0) == 0:
            raise RuntimeError(
                f"{name} has one place in memory for all channels, and cannot advance"
            )
        if buffer.requires_grad:
            raise RuntimeError(
                f"batch_norm is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
