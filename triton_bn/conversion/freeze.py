"""``freeze``: batch normalization that stays in evaluation, whatever ``train()`` says, for fine-tuning."""

from __future__ import annotations

import logging
import warnings
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from triton_bn.conversion.derive import Refused
from triton_bn.conversion.replace import LOCK, Change, Frozen, apply, frozen, thawed
from triton_bn.problem import require_module

__all__ = ["freeze", "unfreeze"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

#: On a frozen layer: the names of those of its parameters that had gradients before.
_STOPPED = "_frozen_parameters"


def freeze(model: Model, *, parameters: bool = False) -> Model:
    """Every batch norm of the model normalizes by its running statistics, and never advances them.

    As in evaluation, whatever ``train()`` says, until :func:`unfreeze`: what fine-tuning on small batches wants.
    It holds for torch.nn's layers and ours, converted or built, SyncBatchNorm (which then exchanges nothing), and
    subclasses that ask ``self.training`` as those do. A layer stays the same object and says ``frozen`` where it is
    printed; its ``state_dict`` is what it was. Copies and pickled layers are frozen as well, and
    :func:`convert` and :func:`revert` leave them so. What another tool puts in a layer's place is not.

    Without running statistics (``track_running_stats=False``, or a lazy layer not called yet) there is nothing to
    normalize by: such a layer is left, with a warning that names it.

    Args:
        model: any module, a layer included.
        parameters: stop the gradients of the layers' weights and biases as well (``requires_grad`` is False).

    Returns:
        ``model`` itself.

    Raises:
        TypeError: for what is no module.

    Example:
        >>> import torch, triton_bn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> triton_bn.freeze(triton_bn.convert(model), parameters=True).train()[1]
        triton_bn.BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, ..., frozen)
        >>> model(5 + torch.randn(2, 3, 9, 9)).sum().backward()
        >>> model[1].weight.grad is None, bool(model[1].running_mean.any())
        (True, False)
        >>> triton_bn.unfreeze(model)[1].weight.requires_grad
        True
    """
    require_module(model)
    changes: list[Change] = []
    left: list[str] = []
    with LOCK:
        layers = _layers(model)
        for layer, name in list(layers.items()):
            try:
                if isinstance(layer, LazyModuleMixin):
                    raise Refused("not called yet")
                if layer.running_mean is None or layer.running_var is None:
                    raise Refused("without running statistics")
                cls = frozen(type(layer), parametrize.is_parametrized(layer))
            except Refused as refused:
                left.append(f"{name or '(model)'} ({refused})")
                del layers[layer]
                continue
            if cls is not type(layer):
                changes.append((layer, "__class__", cls))
        apply(changes)
        for layer in layers if parameters else ():
            stopped = [name for name, p in layer.named_parameters() if p.requires_grad]
            vars(layer)[_STOPPED] = [*vars(layer).get(_STOPPED, ()), *stopped]
        # Only now: layers may share a parameter.
        for layer in layers if parameters else ():
            layer.requires_grad_(False)
    logger.info("froze %d layers of a %s", len(layers), type(model).__name__)
    if left:
        warnings.warn(f"not frozen: {', '.join(left)}", stacklevel=2)
    return model


def unfreeze(model: Model) -> Model:
    """Takes :func:`freeze` back: the layers are in training or evaluation, as ``train()`` and ``eval()`` said last.

    Parameters whose gradients it stopped have gradients again; others stay as they are.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: for what is no module.

    Example:
        >>> import triton_bn
        >>> from torch import nn
        >>> model = triton_bn.freeze(nn.Sequential(nn.BatchNorm1d(3)))
        >>> model.train()[0].training, triton_bn.unfreeze(model)[0].training
        (False, True)
    """
    require_module(model)
    with LOCK:
        layers = _layers(model)
        apply([(la, "__class__", thawed(type(la))) for la in layers if isinstance(la, Frozen)])
        for layer in layers:
            stopped = vars(layer).pop(_STOPPED, ())
            for name, parameter in layer.named_parameters():
                if name in stopped:
                    parameter.requires_grad_(True)
    return model


def _layers(model: nn.Module) -> dict[_BatchNorm, str]:
    return {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
