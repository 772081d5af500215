"""A ResNet that knows nothing of triton_bn, converted whole: its residual adds and ReLUs are fused, too.

python examples/whole_model.py
"""

from __future__ import annotations

import torch
from digits import ResNet, side_by_side

import triton_bn

if __name__ == "__main__":
    torch.manual_seed(0)
    theirs = ResNet()
    ours = triton_bn.convert(ResNet())
    print(triton_bn.conversion_report(ours), end="\n\n")
    side_by_side(theirs, ours, __doc__)

    # PyTorch's layers come back, with what was learned; checkpoints load both ways in any case.
    triton_bn.revert(ours)
    theirs.load_state_dict(ours.state_dict())
