"""``python -m perf memory``: what whole networks keep for backward; counted on a CPU, so no GPU is needed.

Each network is counted as it is (stock), converted, converted with ``recompute=True``, and with its
blocks under ``torch.utils.checkpoint``. The gradients of the converted ones must be the stock's, bit for
bit: without that there is no row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import triton_bn
from perf.commands import arguments
from perf.kept import kept_bytes
from perf.networks import NETWORKS, checkpointed

__all__ = ["WAYS", "add_arguments", "count", "run"]

#: What is done with a model before it is counted.
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "stock": lambda model: model,
    "converted": triton_bn.convert,
    "recompute": partial(triton_bn.convert, recompute=True),
    "torch.utils.checkpoint": checkpointed,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=2, help="images (default: 2)")
    parser.add_argument("--size", type=int, default=224, help="of their sides (default: 224)")
    parser.add_argument(
        "--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)"
    )
    arguments.results(parser)


def run(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    wrong = False
    print(f"{'network':18}" + "".join(f"{way:>24}" for way in WAYS))
    for network in args.network:
        try:
            found = count(network, args.batch, args.size)
        except ImportError as error:
            print(f"{network:18}not counted: {error}")
            wrong = True
            continue
        rows += found
        wrong = wrong or any(row["status"] != "counted" for row in found)
        cells = (f"{row['kept_bytes'] / 2**20:9.1f} MiB {row['share']:6.3f}" for row in found)
        print(f"{network:18}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
        for row in found:
            if row["status"] != "counted":
                print(f"{'':18}{row['way']}: {row['status']}")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "kept.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(path)
    return int(wrong)


def count(network: str, batch: int, size: int) -> list[dict[str, Any]]:
    """A row for each of :data:`WAYS`."""
    rows: list[dict[str, Any]] = []
    stock: list[Tensor | None] = []
    for way, change in WAYS.items():
        torch.manual_seed(0)
        model = change(NETWORKS[network]().train())
        x = torch.randn(batch, 3, size, size)
        torch.manual_seed(1)  # of dropped values and blocks
        kept, output = kept_bytes(model, x)
        output.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        stock = stock or gradients
        same = all(
            a is None if b is None else torch.equal(a, b)  # type: ignore[arg-type]
            for a, b in zip(gradients, stock, strict=True)
        )
        first = rows[0]["kept_bytes"] if rows else kept
        rows.append(
            {
                "network": network, "way": way, "kept_bytes": kept, "share": round(kept / first, 4),
                "batch": batch, "size": size, "dtype": "float32", "torch": torch.__version__,
                "triton_bn": triton_bn.__version__,
                "status": "counted" if same else "other gradients than stock",
            }
        )  # fmt: skip
    return rows
