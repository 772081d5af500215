"""One network on several processes: the digits demo under DistributedDataParallel with SyncBatchNorm.

    python -m torch.distributed.run --nproc-per-node 2 -m triton_bn.demo.ddp

Every process trains on its part of each batch, which need not be of one size. Process 0 also trains a twin alone,
on the whole batches, and compares: in float64, so that only rounding is between the two. On CPU processes
it runs over gloo, on GPUs over NCCL, one process a GPU; on several machines with ``--nnodes`` and the rest
of torchrun's options.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from triton_bn.commands.arguments import positive
from triton_bn.demo.digits import Data, FusedDigits, load
from triton_bn.modules import SyncBatchNorm

__all__ = ["main"]

#: Rounding in float64, grown over a training of some hundred steps.
TOLERANCE = 1e-8


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; 0 where the processes together came to what one alone comes to."""
    parser = argparse.ArgumentParser("triton_bn.demo.ddp", description="SyncBatchNorm under DDP")
    parser.add_argument("--epochs", type=positive, default=3, help="default: %(default)s")
    parser.add_argument("--batch", type=positive, default=64, help="of all processes together")
    args = parser.parse_args(argv)
    if not dist.is_torchelastic_launched():
        print(
            "start it with: python -m torch.distributed.run --nproc-per-node 2 -m triton_bn.demo.ddp",
            file=sys.stderr,
        )
        return 2
    try:
        import sklearn as _sklearn  # noqa: F401
    except ImportError as error:
        print(f'{error}; the demo needs: pip install "triton_bn[demo]"', file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return _train(args.epochs, args.batch, device)
    finally:
        dist.destroy_process_group()


def _train(epochs: int, batch: int, device: torch.device) -> int:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data, test = load(None, device)
    torch.manual_seed(0)
    alone = FusedDigits().double().to(device)
    torch.manual_seed(0)
    network = SyncBatchNorm.convert_sync_batchnorm(FusedDigits().double().to(device))
    shared = DistributedDataParallel(network)
    trained = [(shared, rank, ranks), (alone, 0, 1)] if rank == 0 else [(shared, rank, ranks)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model, *_ in trained]
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch):
            if len(index) == 1:
                continue  # no variance
            for (model, i, parts), optimizer in zip(trained, optimizers, strict=True):
                own = index.tensor_split(parts)[i].to(device)
                logits = model(data.images[own].double(), torch.contiguous_format)
                loss = F.cross_entropy(logits, data.labels[own], reduction="sum")
                optimizer.zero_grad()
                # DDP averages over the processes; over all values is what is meant.
                (loss * parts / len(index)).backward()
                optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: {_accuracy(network, test):.1%} of the test images are read")
    if rank > 0:
        return 0
    found = network.state_dict()
    apart = max(
        (found[name] - value).abs().max().item() for name, value in alone.state_dict().items()
    )
    right = apart <= TOLERANCE
    print(
        f"{ranks} processes and one alone ({_accuracy(alone, test):.1%}): "
        f"{'agree' if right else 'DISAGREE'}, parameters and statistics differ by {apart:.1e} at most"
    )
    return 0 if right else 1


@torch.no_grad()
def _accuracy(network: nn.Module, test: Data) -> float:
    network.eval()
    digits = network(test.images.double(), torch.contiguous_format).argmax(1)
    network.train()
    return (digits == test.labels).double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
