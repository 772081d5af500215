"""Drop-in layers: each is its ``torch.nn`` twin with ``activation=`` and ``forward(input, residual=None)``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from triton_bn.conversion.replace import LOCK, apply, recorded, replacements
from triton_bn.functional import _batch_norm
from triton_bn.plan import Candidates, Device, Plans, candidates
from triton_bn.problem import Activation, Problem, check, require_tensor
from triton_bn.sync import Ranks, group_of
from triton_bn.tuning.results import Report
from triton_bn.tuning.tune import tune
from triton_bn.verbs import plans, problems

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]


class _Fused(nn.modules.batchnorm._BatchNorm):
    """What the layers share. Buffers, parameters, errors and state_dict are those of the twin."""

    activation: Activation | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | Activation | None = None,
    ) -> None:
        resolved = Activation.of(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch.nn's own layers take the argument only in newer releases
            self.register_parameter("bias", None)
        self.activation = resolved

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """``activation(bn(input) + residual)``.

        Args:
            input: (N, C, *).
            residual: added before the activation, as PyTorch's ``+`` would add it.
            mask: (N, *), bool, with any strides: which values take part. Statistics, gradients and
                running statistics are those of batch norm over these alone; where it is False the result is 0.

        Returns:
            A tensor of the input's shape, dtype and memory format.

        Raises:
            RuntimeError: a mask of another shape, dtype or device. Nothing has been changed then.
        """
        given: Any = input
        if isinstance(given, Proxy):
            return recorded(self, given, residual, mask=mask)
        return self._fused(input, residual, self.activation, mask)

    def _fused(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: Activation | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``activation(bn(input) + residual)``, whatever activation the layer was built with.

        For callers that fuse what follows a layer (:mod:`triton_bn.conversion.fuse`).
        """
        self._check_input_dim(input)
        return self._run(input, residual, activation, mask=mask)

    def _run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: Activation | None,
        ranks: Ranks | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        training, mean, var, tracked = self.training, None, None, None
        if not training or self.track_running_stats:
            mean, var = self._tensor("running_mean"), self._tensor("running_var")
        if training and self.track_running_stats:
            tracked = self._tensor("num_batches_tracked")
        return _batch_norm(
            input,
            mean,
            var,
            tracked,
            self._tensor("weight"),
            self._tensor("bias"),
            training or (mean is None and var is None),
            self.momentum,
            self.eps,
            residual,
            activation,
            ranks,
            mask,
        )

    def _tensor(self, name: str) -> Tensor | None:
        """``getattr(self, name)``, of which a module asks much before it looks where it keeps its tensors."""
        own = self._buffers if name in self._buffers else self._parameters
        return own[name] if name in own else getattr(self, name)

    def plan(
        self, input: Tensor, residual: Tensor | None = None, *, device: Device | str | None = None
    ) -> Plans:
        """The launch plans that this input's forward and backward would run by, and why.

        Args:
            input: (N, C, *). Only its shape, strides and dtype count: it may be on the meta device.
            residual: whether there is one counts, nothing else of it.
            device: a GPU that need not be here: its name (``"H100"``), its architecture (``"sm_90"``) or a
                :class:`triton_bn.plan.Device`. By default where the input is; a CPU tensor's plan is that
                of Triton's interpreter.

        Returns:
            Plans: ``print`` it, or take ``forward``, ``backward``, ``as_rows()``.

        Raises:
            ValueError, RuntimeError, TypeError: what a call with this input raises; an unknown ``device``.

        Example:
            >>> import torch, triton_bn
            >>> x = torch.empty(32, 256, 7, 7, dtype=torch.bfloat16, device="meta")
            >>> print(triton_bn.BatchNorm2d(256, activation="relu").plan(x, device="H200").forward)
            resident: 8 channels a program, 8 x [4, 512], 8 warps (heuristic)
        """
        return plans(self._problems(input, residual), self._device(input, device))

    def candidates(
        self, input: Tensor, residual: Tensor | None = None, *, device: Device | str | None = None
    ) -> Candidates:
        """The launch plans that this input's forward and backward may run by: ``print`` them.

        :meth:`tune` times them, and inside ``with triton_bn.use(plan):`` the layer runs by one of them. The
        arguments and errors are those of :meth:`plan`.
        """
        met, gpu = self._problems(input, residual), self._device(input, device)
        return Candidates(gpu, met, candidates(met[0], gpu), candidates(met[1], gpu))

    def _device(self, input: Tensor, device: Device | str | None) -> Device:
        if isinstance(device, str):
            return Device.named(device)
        return device or Device.current(input.device)

    def _problems(self, input: Tensor, residual: Tensor | None) -> tuple[Problem, Problem]:
        """What a call with this input is to the kernels, forward and backward."""
        require_tensor("input", input)
        self._check_input_dim(input)
        mean, var, weight, bias = (
            None if tensor is None else tensor.to("meta")
            for tensor in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        training = self._uses_batch_statistics() or self.running_mean is None
        check(input.to("meta"), mean, var, weight, bias, training, self.eps)
        return problems(
            input,
            training=self._uses_batch_statistics(),
            residual=residual is not None,
            activation=self.activation,
            cumulative=self.training
            and self.momentum is None
            and self.num_batches_tracked is not None,
        )

    def _uses_batch_statistics(self) -> bool:
        """Whether one launch may compute statistics and normalize by them."""
        return self.training or self.running_mean is None

    def tune(self, input: Tensor, residual: Tensor | None = None, *, again: bool = True) -> Report:
        """Times every candidate plan for this input on scratch tensors, and remembers the fastest.

        The layer, its statistics and gradients, and the input stay as they were.

        Args:
            input, residual: what the layer is called with, (N, C, *), on a GPU.
            again: search even what has been searched before.

        Returns:
            The table of candidates with their times, printable, for each problem of forward and backward.

        Raises:
            RuntimeError: without a GPU.
        """
        return tune(self, input, residual, again=again)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile triton_bn's layers: triton_bn.revert(model) puts PyTorch's back"
        )

    def _get_name(self) -> str:
        # What print(model) calls the layer: PyTorch's twin has the same class name.
        return f"triton_bn.{super()._get_name()}"

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``: :class:`BatchNorm2d` for (N, C) and (N, C, L).

    Every channel c is normalized by the mean and the variance of its N values ``x[:, c]``, or N·L values
    ``x[:, c, :]``. The formula, the arguments and the errors are those of :class:`BatchNorm2d`.

    Shape:
        - input, output, residual: (N, C) or (N, C, L)
        - weight, bias, running_mean, running_var: (C,)

    Example:
        >>> import torch, triton_bn
        >>> bn = triton_bn.BatchNorm1d(100, activation="gelu")
        >>> bn(torch.randn(20, 100)).shape
        torch.Size([20, 100])
        >>> bn(torch.randn(20, 100, 35)).shape
        torch.Size([20, 100, 35])

        Sequences of different lengths, padded: the padding enters no statistic, gets no gradient, and stays 0,

        >>> lengths = torch.randint(1, 36, (20,))
        >>> mask = torch.arange(35) < lengths[:, None]  # (N, L), True where there is something
        >>> y = bn(torch.randn(20, 100, 35), mask=mask)
        >>> bool(y.transpose(1, 2)[~mask].any())
        False

        as if the values that are there had been gathered in one (values, channels):

        >>> bn = triton_bn.BatchNorm1d(100)
        >>> x = torch.randn(20, 100, 35)
        >>> y, gathered = bn(x, mask=mask), bn(x.transpose(1, 2)[mask])
        >>> torch.allclose(y.transpose(1, 2)[mask], gathered, atol=1e-5)
        True

        Where nothing takes part the running statistics stay, and y is 0. One value has no variance: an error on
        a CPU; on a GPU, which is not asked, the variance is 0, and the running variance stays.
    """


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, fused with the residual add and the activation behind it.

    Every channel is normalized on its own. Channel c has one mean and one variance, taken over all other
    dimensions, that is over its M = N·H·W values ``x[:, c, :, :]``, and one γ and one β::

        mean[c]       = Σ_nhw x[n, c, h, w] / M
        var[c]        = Σ_nhw (x[n, c, h, w] − mean[c])² / M
        y[n, c, h, w] = act(γ[c] · (x[n, c, h, w] − mean[c]) / √(var[c] + eps) + β[c] + residual[n, c, h, w])

    So mean, variance, γ (``weight``) and β (``bias``) are vectors of length C: not H·W of them, nor C·H·W.

    In training the mean and the variance are those of the batch. They are found by Welford's method: counts,
    means and sums of squared distances of parts of the channel, merged by Chan's rule, so that nothing
    cancels however far the mean is from 0. The running statistics, also of length C, then advance::

        running_mean ← (1 − momentum) · running_mean + momentum · mean
        running_var  ← (1 − momentum) · running_var  + momentum · var · M / (M − 1)

    In evaluation they are what is normalized by. On a GPU the moments, the transform by γ and β, the residual and
    the activation are one operation, whose results in between never go through memory; backward keeps x, 2·C
    numbers and, where there is an activation behind a residual, the output (relu, relu6, leaky_relu) or
    the residual (the others). On a CPU PyTorch's operators compute the same.

    Names, defaults, buffers, ``state_dict`` and errors are those of PyTorch's layer (Ioffe and Szegedy, *Batch
    Normalization*, 2015; Welford, 1962; Chan, Golub and LeVeque, 1979).

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of the newest batch in the running statistics; ``None``: their average over all
            batches.
        affine: have a weight and a bias. They start at 1 and 0.
        track_running_stats: have running statistics; without, evaluation normalizes by the batch, too.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, have a bias.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``, ``"gelu"``, ``"elu"``,
            ``"mish"``, ``"sigmoid"``, ``"tanh"``, an :class:`Activation` for one with a parameter, or ``None``.

    Shape:
        - input, output, residual: (N, C, H, W), contiguous, channels_last or with other strides; float16,
          bfloat16, float32 or float64. The output has the input's dtype and memory format.
        - weight, bias, running_mean, running_var: (C,)

    Raises:
        ValueError: one value a channel in training; an input that is not 4D; an unknown activation.
        RuntimeError: an input whose number of channels is not ``num_features``; tensors whose devices or dtypes
            do not fit together.
        TypeError: a residual that is no tensor.

    Example:
        >>> import torch, triton_bn
        >>> bn = triton_bn.BatchNorm2d(3)
        >>> x = 5 + 2 * torch.randn(8, 3, 16, 16)
        >>> y = bn(x)
        >>> bool(y.mean(dim=(0, 2, 3)).abs().max() < 1e-5)  # one mean a channel: over N, H and W
        True
        >>> bn.weight.shape, bn.bias.shape, bn.running_mean.shape, bn.running_var.shape
        (torch.Size([3]), torch.Size([3]), torch.Size([3]), torch.Size([3]))

        With what follows a convolution in a residual network, in one go:

        >>> bn = triton_bn.BatchNorm2d(3, activation="relu")
        >>> y = bn(x, residual=x)  # relu(bn(x) + x)
        >>> bool(y.min() >= 0)
        True
    """


class BatchNorm3d(_Fused, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``: :class:`BatchNorm2d` for (N, C, D, H, W).

    Every channel c is normalized by the mean and the variance of its N·D·H·W values ``x[:, c, :, :, :]``. The
    formula, the arguments and the errors are those of :class:`BatchNorm2d`.

    Shape:
        - input, output, residual: (N, C, D, H, W)
        - weight, bias, running_mean, running_var: (C,)

    Example:
        >>> import torch, triton_bn
        >>> bn = triton_bn.BatchNorm3d(3, activation="silu")
        >>> bn(torch.randn(2, 3, 4, 5, 6)).shape
        torch.Size([2, 3, 4, 5, 6])
    """


class SyncBatchNorm(_Fused):
    """``torch.nn.SyncBatchNorm``: :class:`BatchNorm2d` for (N, C, *), its batch shared by many processes.

    In training every process of ``process_group`` (the default group for ``None``) normalizes its part of
    the batch by the statistics of all parts, which may be of different sizes, or empty. Gradients of
    weight and bias are those of the own part, as PyTorch's are: DDP averages them. Elsewhere (evaluation,
    a group of one, torch.distributed not initialized) it is plain batch norm.

    It runs on CPU tensors too. Therefore it is no subclass of ``torch.nn.SyncBatchNorm``, with which DDP refuses
    every model on a CPU.

    A training step makes one collective forward and one backward, and the first step one more, which
    compares the ranks' ``num_features`` (:mod:`triton_bn.sync`).

    Raises:
        RuntimeError: on every rank, where the ranks disagree on ``num_features`` or on the input's dtype, or
            where one of them raises before it has sent its moments (that one raises its own error). On a GPU
            the others, and ranks that disagree on the dtype, stop with a device assertion.
        ValueError: on every rank, where there is one value a channel on all of them together.

    Args:
        process_group: the processes that share a batch; ``None`` is the default group. The others are those of
            :class:`BatchNorm2d`.

    Shape:
        - input, output, residual: (N, C, *), N of this process alone: it may differ, and be 0
        - weight, bias, running_mean, running_var: (C,)

    Example:
        One process alone has the whole batch; under ``torchrun`` the same lines share it:

        >>> import torch, triton_bn
        >>> bn = triton_bn.SyncBatchNorm(4, activation="relu")
        >>> bn(torch.randn(2, 4, 5)).shape
        torch.Size([2, 4, 5])

        A whole model's layers become synchronized by ``triton_bn.convert(model, sync=True)``.
    """

    #: The group that has been asked whether its ranks agree on num_features.
    _agreed: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | Activation | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation,
        )  # fmt: skip
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def _fused(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: Activation | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        group = group_of(self.process_group) if self.training else None
        if group is None:
            return super()._fused(input, residual, activation, mask)
        own = (self.weight, self.bias, self.running_mean, input)
        device = next(tensor.device for tensor in own if tensor is not None)
        ranks = Ranks(group, self.num_features, device, self._agreed is not group)
        try:
            with ranks.together():
                self._check_input_dim(input)
                y = self._run(input, residual, activation, ranks, mask)
            ranks.ask = False  # an operator asks by ranks of its own
        finally:
            # As soon as the ranks agree, whatever this one raises then: they must all know the same.
            if not ranks.ask:
                self._agreed = group
        return y

    def _uses_batch_statistics(self) -> bool:
        # Between the moments and the transform of a shared batch there is a collective.
        shared = self.training and group_of(self.process_group) is not None
        return super()._uses_batch_statistics() and not shared

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # no copy of it: both synchronize over it
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # A copy asks for itself: a process group does not travel.
        return {name: value for name, value in self.__dict__.items() if name != "_agreed"}

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Any | None = None
    ) -> nn.Module:
        """Makes every batch norm in a model this layer, in place, as :func:`triton_bn.convert` does.

        Layers stay the same objects: what is shared, pruned, parametrized, lazy or has hooks stays so.
        One that has a forward of its own is left, with a warning: it is not known what it computes.

        Args:
            module: a model with batch norm layers, or such a layer.
            process_group: the processes that are to share batches; ``None`` is all of them.

        Returns:
            ``module`` itself.
        """
        layers = {
            m: n
            for n, m in module.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }
        with LOCK:
            found = replacements(layers, TWINS, sync=cls, process_group=process_group, regroup=True)
            apply([change for one in found.values() for change in one.changes])
        left = [
            f"{layers[m]!r} ({one.note})"
            for m, one in found.items()
            if not issubclass(one.after, cls)
        ]
        if left:
            warnings.warn(
                f"not synchronized, since they were left as they are: {', '.join(left)}",
                stacklevel=2,
            )
        return module


#: The layers of torch.nn, and ours.
TWINS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
