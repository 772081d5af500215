"""A ResNet on PyTorch's batch norm, and the same on ours: one name is another.

python examples/import_swap.py
"""

from __future__ import annotations

import torch
from digits import ResNet, side_by_side
from torch import nn

import triton_bn

if __name__ == "__main__":
    torch.manual_seed(0)
    theirs = ResNet(norm=nn.BatchNorm2d)
    ours = ResNet(norm=triton_bn.BatchNorm2d)
    side_by_side(theirs, ours, __doc__)
