"""``tune``: the search over what a layer or a whole model meets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from triton_bn.plan import Device
from triton_bn.problem import Problem, require_module
from triton_bn.tuning import search
from triton_bn.tuning.memory import record
from triton_bn.tuning.resolve import resolve
from triton_bn.tuning.results import Report

__all__ = ["compile_ahead", "tune"]


def tune(
    model: nn.Module,
    *inputs: Any,
    again: bool = False,
    budget: float | None = None,
    progress: bool = True,
) -> Report:
    """Finds the fastest plan for every batch norm that a model runs, the largest first.

    All candidates are compiled first, in parallel processes; those that the compiler's facts rule out are not
    timed. Whatever ends it, what was found until then is remembered.

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
        RuntimeError: without a GPU, before anything runs; where no batch norm of this package ran on a GPU.
        TimeoutError: when another process has been tuning for too long.
        Interrupted: for Ctrl-C, after what was found has been stored.

    Example:
        On a GPU::

            model = triton_bn.convert(torchvision.models.resnet50()).cuda().train()
            images = torch.randn(128, 3, 224, 224, device="cuda")
            print(triton_bn.tune(model, images).summary())
    """
    require_module(model)
    search.require_gpu("tune")
    return search.search_all(
        _problems_of(model, inputs), again=again, budget=budget, progress=progress
    )


def compile_ahead(model: nn.Module, *inputs: Any, progress: bool = True) -> int:
    """Compiles the kernels that a model's first step would, on all CPUs, into Triton's cache on disk.

    A first training step compiles them one after another, about half a second each. A copy of the model runs
    once on the inputs, as for :func:`tune`, but its batch norms compute nothing: their results are whatever lies
    in memory. (Those of a model with ``SyncBatchNorm`` do compute, so they compile one after another.) Then
    the processes that train find what they need in the cache (``TRITON_CACHE_DIR``).

    Args:
        model: a model or one layer, on the current GPU.
        inputs: what it is called with, of the real size.
        progress: show it on stderr.

    Returns:
        How many plans (of one launch or two each) were compiled.

    Raises:
        TypeError: for a model that is no module.
        RuntimeError: without a GPU, before anything runs; where no batch norm of this package ran on one; and
            for a plan that does not compile, in the compiler's words, when the others are done.

    Example:
        On a GPU::

            triton_bn.compile_ahead(model, images)
    """
    require_module(model)
    search.require_gpu("compile")
    from triton_bn.tuning import ahead  # Triton is not there on every platform

    # A shared batch is asserted to fit together on the GPU: those layers must compute.
    shared = any(hasattr(module, "process_group") for module in model.modules())
    with nullcontext() if shared else _nothing_launched():
        met = search.on_a_gpu(_problems_of(model, inputs), "compile")
    found = ahead.compile_plans(
        [(problem, device, (resolve(problem, device),)) for problem, device in met],
        progress=progress,
    )
    answers = [answer for plans in found.values() for answer in plans.values()]
    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        raise RuntimeError(f"{len(failed)} plans do not compile, the first: {failed[0]}")
    return len(answers)


_SKIPS = "triton_bn.compile_ahead"


@contextmanager
def _nothing_launched() -> Iterator[None]:
    """Meanwhile no kernel is launched, nor compiled, by this thread and the backward passes that it starts."""
    from triton_bn import launch

    usual = launch.run

    def run(*arguments: Any) -> None:
        if not (torch._C._is_key_in_tls(_SKIPS) and torch._C._get_obj_in_tls(_SKIPS)):
            usual(*arguments)

    launch.run = run  # type: ignore[assignment]
    torch._C._stash_obj_in_tls(_SKIPS, True)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_SKIPS, False)
        launch.run = usual


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
