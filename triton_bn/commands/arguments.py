"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse

import torch

__all__ = ["CHANNELS_LAST", "DTYPES", "positive", "shape"]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

#: The channels_last format of a tensor of so many dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def shape(text: str) -> tuple[int, ...]:
    """``"32,64,56,56"`` as an input's shape, for argparse's ``type=``."""
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected N,C or N,C,L or N,C,H,W or N,C,D,H,W, but got {text!r}"
        )
    return sizes


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse's ``type=``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, but got {text!r}")
    return int(text)
