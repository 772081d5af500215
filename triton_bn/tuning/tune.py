"""``tune``: the search over what a layer or a whole model meets."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from triton_bn.plan import Device
from triton_bn.problem import Problem, require_module
from triton_bn.tuning.memory import record
from triton_bn.tuning.results import Report
from triton_bn.tuning.search import search_all

__all__ = ["tune"]


def tune(
    model: nn.Module,
    *inputs: Any,
    again: bool = False,
    budget: float | None = None,
    progress: bool = True,
) -> Report:
    """Finds the fastest plan for every batch norm that a model runs, the largest first.

    A copy of the model runs once on the inputs: forward, and backward where gradients are enabled.
    So call it as the model will be called: in its mode (``train()`` or ``eval()``), under the same
    autocast or ``torch.no_grad()``, with a batch of the real size. The model, its statistics and
    gradients, the inputs and the random state stay as they were. A model with ``SyncBatchNorm`` is
    tuned by all ranks at once, as it is trained; of a ``DistributedDataParallel`` give the
    ``module``.

    Args:
        model: a model or one layer, on the current GPU.
        inputs: what it is called with.
        again: time also the problems whose search was completed before; else their result is one
            row, ``"remembered"``.
        budget: seconds for all searches together.
        progress: show it on stderr.

    Returns:
        Report: ``print`` it for every candidate with its times, its ``summary()`` for the best alone, or
        take ``as_rows()``.

    Raises:
        TypeError: for a model that is no module.
        RuntimeError: where no batch norm of this package ran on a GPU.
        TimeoutError: when another process has been tuning for too long.
        Interrupted: for Ctrl-C, after what was found has been stored.

    Example:
        On a GPU::

            model = triton_bn.convert(torchvision.models.resnet50()).cuda().train()
            images = torch.randn(128, 3, 224, 224, device="cuda")
            print(triton_bn.tune(model, images).summary())
    """
    require_module(model)
    return search_all(_problems_of(model, inputs), again=again, budget=budget, progress=progress)


def _problems_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Problem, Device]]:
    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # The layers of a model see activations, which require gradients; an example seldom does.
        return value.detach().requires_grad_(value.is_floating_point() and torch.is_grad_enabled())

    model, inputs = copy.deepcopy(model), tree_map(own, inputs)
    gpus = {
        leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_cuda
    }
    with torch.random.fork_rng(devices=sorted(gpus, key=str)), record() as seen:
        leaves = tree_leaves(model(*inputs))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return list(seen)
