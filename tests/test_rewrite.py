"""What of a source may be edited: plain functions whose source is surely what runs."""

from __future__ import annotations

import ast
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bn.conversion import rewrite
from triton_bn.conversion.derive import Refused, merged

SCALE = 2.0
ROLES = (("self.bn", "opens"), ("self.act", "activates"))


def holder(forward: Callable[..., Any]) -> Any:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm1d(2), nn.ReLU()

    Module.forward = forward  # type: ignore[method-assign]
    return Module


@torch.no_grad()
def decorated(self: Any, x: Tensor) -> Tensor:
    return self.act(self.bn(x))


def generates(self: Any, x: Tensor) -> Any:
    yield self.act(self.bn(x))


def asks_for_its_names(self: Any, x: Tensor) -> Any:
    return locals()


def private(self: Any, x: Tensor) -> Tensor:
    return self.__bn(x)


def no_arguments() -> None:
    return None


first, second = lambda self, x: self.bn(x), lambda self, x: self.act(x)


def changed(self: Any, x: Tensor) -> Tensor:
    return self.act(self.bn(x))


changed.__code__ = changed.__code__.replace(co_names=("bn", "act"))

generated: dict[str, Any] = {}
exec("def forward(self, x):\n    return self.act(self.bn(x))", generated)


@pytest.mark.parametrize(
    "function",
    [
        decorated, generates, asks_for_its_names, private, no_arguments, first, second, changed,
        generated["forward"], torch.relu, staticmethod(changed),
    ],
    ids=lambda function: getattr(function, "__name__", "staticmethod"),
)  # fmt: skip
def test_what_is_no_plain_function_with_its_source_is_left(function: Any) -> None:
    with pytest.raises(Refused):
        rewrite.source(function)


def outer(scale: float) -> Any:
    class Base(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * scale * SCALE

    class Module(Base):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm1d(2), nn.ReLU()

        def forward(self, x: Tensor, *more: Tensor, factor: float = 1.0, **kw: Any) -> Tensor:
            """What it does."""
            y = self.act(self.bn(x))
            return super().forward(y) * factor * scale

    def change(value: float) -> None:
        nonlocal scale
        scale = value

    return Module, change


def test_globals_closures_defaults_and_super_stay_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    cls, change = outer(3.0)
    new = rewrite.rewritten(cls, (("forward", ROLES),))
    assert rewrite.rewritten(cls, (("forward", ROLES),)) is new
    assert new is not cls
    stock, edited = cls(), new()
    x = torch.randn(5, 2)
    assert torch.equal(edited(x), stock(x))
    change(5.0)
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    assert torch.equal(edited(x, factor=2.0), stock(x, factor=2.0))
    assert inspect.signature(new.forward) == inspect.signature(cls.forward)
    assert inspect.getsource(new.forward) == inspect.getsource(cls.forward)
    assert new.forward.__doc__ == "What it does."


def test_an_error_shows_the_line_it_comes_from() -> None:
    cls = holder(changed_line)
    edited = rewrite.rewritten(cls, (("forward", ROLES),))()
    edited.act = None
    try:
        edited(torch.randn(5, 2))
    except TypeError as error:
        frames = traceback.extract_tb(error.__traceback__)
    assert any(frame.line == "return self.act(x)" for frame in frames)


def changed_line(self: Any, x: Tensor) -> Tensor:
    x = self.bn(x)
    return self.act(x)


def edit(function: Any, **roles: str) -> str:
    roles = {f"self.{name}": role for name, role in roles.items()}
    tree = rewrite.Editor(rewrite.source(function), rewrite.Reader(function, roles)).tree
    return ast.unparse(tree.body).replace("_triton_bn_fuse.", "")


def block(self: Any, x: Tensor) -> Tensor:
    identity = x
    out = self.conv(x)
    out = self.bn(out)
    if self.down is not None:
        identity = self.down(x)
    out += identity
    return self.act(out)


def left(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x) + self.conv(x))


def looks(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    act = getattr(self, "act", None)
    if isinstance(act, nn.Module) and len(self.blocks) > 2:
        y = self.act(y)
    return y


def opaque(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    self.last = x
    y = self.act(y)
    for block in self.blocks:
        y = block(y)
    return y


def test_calls_become_calls_that_fuse_and_nothing_else_changes() -> None:
    assert edit(block, bn="opens", down="opens", act="activates") == (
        "identity = x\n"
        "out = self.conv(x)\n"
        "out = call(self.bn, out)\n"
        "if self.down is not None:\n"
        "    identity = call(after(self.down, out), x)\n"
        "out = add_in_place(out, identity)\n"
        "return value(call(self.act, out))"
    )
    assert edit(left, bn="opens") == (
        "return F.relu(value(add((_triton_bn_0 := call(self.bn, x)), "
        "after(self.conv, _triton_bn_0)(x))))"
    )
    assert edit(looks, bn="opens", act="activates") == (
        "y = call(self.bn, x)\n"
        "act = getattr(self, 'act', None)\n"
        "if isinstance(act, nn.Module) and len(self.blocks) > 2:\n"
        "    y = value(call(self.act, y))\n"
        "return y"
    )
    assert edit(opaque, bn="opens", act="activates") == (
        "y = call(self.bn, x)\n"
        "y = value(y)\n"
        "self.last = x\n"
        "y = self.act(y)\n"
        "for block in self.blocks:\n"
        "    y = block(y)\n"
        "return y"
    )
    assert edit(block) == ast.unparse(rewrite.source(block).body)


def test_a_class_that_pickles_in_its_own_way_is_not_subclassed() -> None:
    class Own(nn.Module):
        def __reduce__(self) -> Any:
            return Own, ()

    with pytest.raises(Refused, match="pickles"):
        merged(Own)
