"""What the examples share: handwritten digits, a small ResNet, and a training loop. Nothing here knows of triton_bn."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Data(NamedTuple):
    """Images (N, 1, 8, 8) between 0 and 1, and what they show, (N,)."""

    images: Tensor
    labels: Tensor


def load(limit: int | None, device: torch.device) -> tuple[Data, Data]:
    """Scikit-learn's 1797 scans, to train (the first 1437, or ``limit``) and to test (the last 360)."""
    scans = load_digits()
    images = torch.as_tensor(scans.images[:, None] / 16, dtype=torch.float32, device=device)
    labels = torch.as_tensor(scans.target, device=device)
    train = slice(min(limit or 1437, 1437))
    return Data(images[train], labels[train]), Data(images[-360:], labels[-360:])


class Block(nn.Module):
    """A residual block: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``."""

    def __init__(self, inside: int, outside: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = norm(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = norm(outside)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A ResNet for images (N, 1, 8, 8); ``norm`` makes its batch norms."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1, norm), Block(16, 32, 2, norm))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    batch: int = 64,
    lr: float = 0.1,
    parts: int = 1,
    part: int = 0,
) -> list[float]:
    """Trains on every batch, or on one of its ``parts``; returns the loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch):
            if len(index) < batch:
                break
            own = index.tensor_split(parts)[part].to(data.labels.device)
            loss = F.cross_entropy(model(data.images[own]), data.labels[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of images that are read right."""
    model.eval()
    right = model(data.images).argmax(1) == data.labels
    model.train()
    return right.double().mean().item()


def arguments(about: str) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, help="train on so many images only")
    return parser.parse_args()


def side_by_side(theirs: nn.Module, ours: nn.Module, about: str) -> None:
    """Trains both networks from the same weights on the same batches, and prints what came of it."""
    args = arguments(about)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, test = load(args.limit, device)
    ours.load_state_dict(theirs.state_dict())
    losses = {}
    for name, model in (("torch.nn", theirs), ("triton_bn", ours)):
        losses[name] = train(model.to(device), data, args.epochs)
        print(
            f"{name:10} loss {losses[name][0]:.4f} → {losses[name][-1]:.4f}, "
            f"{accuracy(model, test):.1%} of the test images are read"
        )
    first = abs(losses["torch.nn"][0] - losses["triton_bn"][0])
    last = abs(losses["torch.nn"][-1] - losses["triton_bn"][-1])
    print(f"the losses differ by {first:.1e} in the first step, by {last:.1e} in the last")
