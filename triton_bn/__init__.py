"""Batch normalization for PyTorch as Triton kernels: drop-in layers, fused with what follows them.

The logger ``triton_bn`` (:mod:`logging`) says at level INFO what is converted and what is left and why, what is
searched and found, and which plan or file is refused.
"""

from triton_bn import functional
from triton_bn.conversion.convert import conversion_report, convert, revert
from triton_bn.conversion.freeze import freeze, unfreeze
from triton_bn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from triton_bn.problem import Activation
from triton_bn.recompute import recompute
from triton_bn.tuning.resolve import use
from triton_bn.tuning.tune import compile_ahead, tune
from triton_bn.version import __version__

__all__ = [
    "Activation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "__version__",
    "compile_ahead",
    "conversion_report",
    "convert",
    "freeze",
    "functional",
    "recompute",
    "revert",
    "tune",
    "unfreeze",
    "use",
]
