"""What may be read as a graph: straight-line code, and nothing that a graph would lose."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_bn.conversion.rewrite import Refused, merged, rewritten, trace


class Options:
    flag = True


OPTIONS = Options()


def holder(forward: Callable[..., Any]) -> Any:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.missing, self.outputs, self.p = nn.Linear(2, 2), None, [], 0.5
            self.children_ = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
            self.functions = [F.relu]

        def helper(self, x: Tensor) -> Tensor:
            return F.relu(x)

        def branching_helper(self, x: Tensor) -> Tensor:
            return x if x is None else F.relu(x)

    Module.forward = forward  # type: ignore[method-assign]
    return Module()


def asks_type(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if isinstance(x, Tensor) else x


def asks_none(self: Any, x: Tensor) -> Tensor:
    return x if x is None else F.relu(x)


def asks_membership(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if x in (None, 1) else x


def asks_class(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if x.__class__ == Tensor else x


def asks_attribute(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if hasattr(x, "mask") else x


def asks_torch(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if torch.is_tensor(x) else x


def asks_state(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if torch.is_grad_enabled() else x


def asks_option(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if OPTIONS.flag else x


def asks_childs_mode(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if self.child.training else x


def asks_mode(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if self.training else x


def scales_by_mode(self: Any, x: Tensor) -> Tensor:
    return x * (self.p if self.training else 1.0)


def asks_value(self: Any, x: Tensor) -> Tensor:
    return F.relu(x) if x.sum() > 0 else x


def asks_indirectly(self: Any, x: Tensor) -> Tensor:
    return self.branching_helper(x)


def asks_in_function(self: Any, x: Tensor) -> Tensor:
    return asks_none(self, x)


def in_context(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.child(x)


def catches(self: Any, x: Tensor) -> Tensor:
    try:
        return self.child(x)
    except RuntimeError:
        return x


def defines(self: Any, x: Tensor) -> Tensor:
    relu = lambda y: F.relu(y)  # noqa: E731
    return relu(x)


def comprehends(self: Any, x: Tensor) -> Tensor:
    return torch.cat([child(x) for child in self.children_])


def keeps(self: Any, x: Tensor) -> Tensor:
    self.last = self.child(x)
    return self.last


def appends(self: Any, x: Tensor) -> Tensor:
    self.outputs.append(x)
    return self.child(x)


def checkpoints(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.child, x, use_reentrant=False)


def from_a_list(self: Any, x: Tensor) -> Tensor:
    for function in self.functions:
        x = function(x)
    return x


def bypasses_call(self: Any, x: Tensor) -> Tensor:
    return self.child.forward(x)


def prints(self: Any, x: Tensor) -> Tensor:
    print(x)
    return self.child(x)


def takes_more(self: Any, *inputs: Tensor) -> Tensor:
    return self.child(*inputs)


def divides_in_place(self: Any, x: Tensor) -> Tensor:
    x //= 2
    return x


def makes_noise(self: Any, x: Tensor) -> Tensor:
    return self.child(x) + torch.rand(2)


@torch.no_grad()
def decorated(self: Any, x: Tensor) -> Tensor:
    return self.child(x)


@pytest.mark.parametrize(
    "forward",
    [
        asks_type, asks_none, asks_membership, asks_class, asks_attribute, asks_torch, asks_state,
        asks_option, asks_childs_mode, asks_mode, scales_by_mode, asks_value, asks_indirectly,
        asks_in_function, in_context, catches, defines, comprehends, keeps, appends, checkpoints,
        from_a_list, bypasses_call, prints, takes_more, divides_in_place, makes_noise, decorated,
    ],
)  # fmt: skip
def test_a_forward_that_a_graph_would_not_tell_is_refused(forward: Callable[..., Any]) -> None:
    module = holder(forward)
    before = dict(vars(module))
    with pytest.raises(Refused):
        trace(module)
    assert vars(module) == before
    assert module.outputs == []


def straight(self: Any, x: Tensor, scale: float = 2.0) -> Tensor:
    """Everything that passes."""
    y = z = self.helper(self.child(x))
    y += x * scale
    if self.missing is not None:
        y = self.missing(y)
    for i, child in enumerate(self.children_):
        y = child(y) if i < len(self.children_) else y
    y = F.dropout(y, self.p, training=self.training)
    assert isinstance(self.child, nn.Linear), f"{self.child}"
    return torch.cat([y, z.relu(), self.children_[0](x)], dim=-1).view(x.size(0), -1)


def test_a_straight_forward_is_read_and_written_again() -> None:
    module = holder(straight)
    graph = trace(module)
    assert any(node.target is operator.iadd for node in graph.nodes)
    assert [node.target for node in graph.nodes if node.op == "get_attr"] == ["training"]
    x = torch.randn(3, 2)
    original = type(module)
    module.__class__ = rewritten(original, graph)
    assert isinstance(module, original)
    for mode in (True, False):
        module.train(mode)
        results = []
        for forward in (original.forward, type(module).forward):
            torch.manual_seed(0)
            results.append(forward(module, x))
        assert torch.equal(*results)
    assert torch.equal(module(x, 3.0), original.forward(module, x, 3.0))


def test_equal_forwards_share_a_class() -> None:
    module = holder(straight)
    assert rewritten(type(module), trace(module)) is rewritten(type(module), trace(module))


def test_a_class_that_pickles_in_its_own_way_is_not_subclassed() -> None:
    class Own(nn.Module):
        def __reduce__(self) -> Any:
            return Own, ()

    with pytest.raises(Refused, match="pickles"):
        merged(Own)
