"""The demo's work: a small network on scanned digits, trained with our layers and with torch's.

Both networks start from the same weights and see the same batches, every other one of them in
channels_last.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bn.demo.lockstep import Difference, Witness, separate
from triton_bn.modules import BatchNorm2d
from triton_bn.plan import Plans

__all__ = ["Data", "Digits", "FusedDigits", "Training", "load"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Digits(nn.Module):
    """A small residual network for images (N, 1, 8, 8), on torch's own batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn_stem = nn.BatchNorm2d(8)
        self.bn_block = nn.BatchNorm2d(8)
        self.bn_down = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 4, 10)

    def norm(self, layer: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return separate(layer)(x, residual)

    def forward(self, images: Tensor, layout: torch.memory_format) -> Tensor:
        x = self.norm(self.bn_stem, self.stem(images).contiguous(memory_format=layout))
        x = self.norm(self.bn_block, self.block(x), x)
        x = self.norm(self.bn_down, self.down(x))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class FusedDigits(Digits):
    """The same network, and the same state_dict, on the layers of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_stem = BatchNorm2d(8, activation="relu")
        self.bn_block = BatchNorm2d(8, activation="relu")
        self.bn_down = BatchNorm2d(16, activation="relu")

    def norm(self, layer: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = layer(x, residual)
        return y


class Data(NamedTuple):
    """Images (N, 1, 8, 8) in 0..1 and labels (N,)."""

    images: Tensor
    labels: Tensor


def load(limit: int | None, device: torch.device) -> tuple[Data, Data]:
    """Scikit-learn's handwritten digits, always split alike: 1437 (or ``limit``) and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images, labels = scans.images[:, None] / 16, scans.target
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = (torch.as_tensor(t, device=device) for t in split)
    return (
        Data(train[:limit].float(), train_labels[:limit]),
        Data(test.float(), test_labels),
    )


class Training:
    """Both networks in training, and what came of it. Work is done by iterating over :meth:`steps`.

    Attributes:
        loss, accuracy: by network ("torch", "ours"), of every step and of every epoch.
        worst: by layer and layout, the largest differences of each result over all steps.
        plans: by layer and layout, what the layer ran by.
        read: by network, the digits last seen in the test images.
    """

    def __init__(self, train: Data, test: Data, epochs: int, batch: int, seed: int) -> None:
        self.train, self.test, self.epochs, self.seed = train, test, epochs, seed
        self.batch = min(batch, len(train.labels))
        self.total = epochs * (len(train.labels) // self.batch)
        torch.manual_seed(seed)
        self.networks = {"torch": Digits(), "ours": FusedDigits()}
        self.networks["ours"].load_state_dict(self.networks["torch"].state_dict())
        for network in self.networks.values():
            network.to(train.images.device)
        self.loss: dict[str, list[float]] = {name: [] for name in self.networks}
        self.accuracy: dict[str, list[float]] = {name: [] for name in self.networks}
        self.worst: dict[tuple[str, str], dict[str, Difference]] = {}
        self.plans: dict[tuple[str, str], Plans] = {}
        self.read: dict[str, Tensor] = {}
        self.seconds = 0.0

    def steps(self) -> Iterator[float]:
        """Trains; after each step, the loss of ours."""
        begin = perf_counter()
        optimizers = [
            torch.optim.SGD(n.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
            for n in self.networks.values()
        ]
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=self.total + 1)
            for optimizer in optimizers
        ]
        witnesses = {
            name: Witness(layer)
            for name, layer in self.networks["ours"].named_modules()
            if isinstance(layer, BatchNorm2d)
        }
        for step, data in enumerate(self._batches()):
            layout = ("contiguous", "channels_last")[step % 2]
            for name, network in self.networks.items():
                network.zero_grad()
                loss = F.cross_entropy(network(data.images, LAYOUTS[layout]), data.labels)
                torch.autograd.backward(loss)
                self.loss[name].append(loss.item())
            for name, witness in witnesses.items():
                self._note((name, layout), witness)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            if (step + 1) % (self.total // self.epochs) == 0:
                self._test()
            self.seconds = perf_counter() - begin
            yield self.loss["ours"][-1]

    def _batches(self) -> Iterator[Data]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.train.labels), generator=generator)
            for index in order.to(self.train.labels.device).split(self.batch):
                if len(index) == self.batch:
                    yield Data(self.train.images[index], self.train.labels[index])

    def _note(self, where: tuple[str, str], witness: Witness) -> None:
        worst = self.worst.setdefault(where, {})
        for name, new in witness.differences().items():
            worst[name] = Difference(*map(max, new, worst.get(name, new)))
        if where not in self.plans and witness.step is not None:
            step = witness.step
            self.plans[where] = witness.layer.plan(step.x, step.residual)

    @torch.no_grad()
    def _test(self) -> None:
        for name, network in self.networks.items():
            network.eval()
            logits = network(self.test.images, torch.contiguous_format)
            network.train()
            self.read[name] = logits.argmax(1)
            right = self.read[name] == self.test.labels
            self.accuracy[name].append(right.double().mean().item())

    @property
    def ratio(self) -> float:
        """The worst error of ours, as a multiple of what is allowed."""
        return max(d.ours for row in self.worst.values() for d in row.values())

    def largest(self, *names: str) -> float:
        """The largest difference from torch in float32 among some results."""
        return max(
            row[name].absolute for row in self.worst.values() for name in names if name in row
        )
