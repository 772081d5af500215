"""A ResNet on several processes, which share every batch: DistributedDataParallel with SyncBatchNorm.

    torchrun --nproc-per-node 2 examples/data_parallel.py

On a CPU the processes talk over gloo; on GPUs, one for each process, over NCCL.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from digits import ResNet, accuracy, arguments, load, train
from torch.nn.parallel import DistributedDataParallel

import triton_bn


def main() -> None:
    args = arguments(__doc__)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data, test = load(args.limit, device)
    torch.manual_seed(0)

    # Every batch norm becomes triton_bn.SyncBatchNorm: its statistics are those of all parts of a batch.
    model = triton_bn.convert(ResNet(), sync=True).to(device)
    parallel = DistributedDataParallel(model)

    losses = train(parallel, data, args.epochs, parts=ranks, part=rank)
    if rank == 0:
        print(
            f"{ranks} processes: loss {losses[0]:.4f} → {losses[-1]:.4f}, "
            f"{accuracy(model, test):.1%} of the test images are read"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    if not dist.is_torchelastic_launched():
        sys.exit("start it with: torchrun --nproc-per-node 2 examples/data_parallel.py")
    main()
