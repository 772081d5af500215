"""Batch normalization for PyTorch as Triton kernels: drop-in layers, fused with what follows them."""

from triton_bn import functional
from triton_bn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from triton_bn.problem import Activation

__version__ = "0.1.0"

__all__ = ["Activation", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "__version__", "functional"]
