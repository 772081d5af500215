"""Which callers of a model's layers are to fuse, and what that will fuse where kernels compute.

This decides what is edited and what the report says. What is fused is decided at each call
(:mod:`triton_bn.conversion.fuse`): where the two differ the report was wrong, no number is.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from triton_bn.conversion import fuse, rewrite
from triton_bn.conversion.derive import Refused, is_derived, merged, underneath
from triton_bn.conversion.replace import Behind, Change
from triton_bn.problem import Activation

__all__ = ["Search"]

_UNKNOWN = object()

#: Methods of a tensor that give no tensor.
_NUMBERS = {"dim", "item", "ndimension", "nelement", "numel", "size", "storage_offset", "stride"}


class _Call(NamedTuple):
    """A call that may be pending: of which layer, with an add or without, and through whom."""

    layer: nn.Module
    added: bool = False
    via: tuple[nn.Module, ...] = ()


_Calls = frozenset[_Call]
_NONE: _Calls = frozenset()


class Search:
    """Reads the forwards of a model. Changes nothing, and runs nothing of it.

    Args:
        layers: those that may fuse what follows, and the class that each has or is to have.
    """

    def __init__(self, model: nn.Module, layers: dict[nn.Module, type]) -> None:
        self.layers = layers
        #: What a layer fuses, and who calls both.
        self.labels: dict[nn.Module, list[tuple[str, nn.Module]]] = defaultdict(list)
        #: Why a layer fuses nothing.
        self.notes: dict[nn.Module, str] = {}
        self.refused: dict[nn.Module, Refused] = {}
        #: The modules that have to fuse, for anything to be fused.
        self.callers: set[nn.Module] = set()
        self.roles: dict[nn.Module, dict[str, dict[str, str]]] = {}
        self._opened: dict[nn.Module, _Calls] = {}
        self.concerned = set[nn.Module]()
        #: The sequences whose children others call by themselves, and what is called.
        self.walked: set[nn.Module] = set()
        self.called: set[nn.Module] = set()
        self._find(model, set())
        for module in model.modules():
            self.opened(module)
        unused = self.walked - self.called
        self.callers -= unused
        for module in model.modules():
            self.labels[module] = [row for row in self.labels[module] if row[1] not in unused]
            for call in self.opened(module):
                if not call.added and not self.labels[call.layer]:
                    names = [
                        type(m).__name__ for m in (*call.via[:1], module) if m is not call.layer
                    ]
                    if names:
                        self.notes.setdefault(call.layer, f"{names[0]} returns it")
        for layer in layers:
            if not fuse.unhooked(layer):
                self.notes[layer] = "it has hooks"

    def _find(self, module: nn.Module, seen: set[nn.Module]) -> bool:
        """Whether a layer is in it."""
        if module not in seen:
            seen.add(module)
            inside = [self._find(child, seen) for child in module.children()]
            if module in self.layers or any(inside):
                self.concerned.add(module)
        return module in self.concerned

    def fused(self, layer: nn.Module) -> str:
        labels = list(dict.fromkeys(label for label, _ in self.labels[layer]))
        behind = [label for label in labels if label.startswith("add + ")]
        return " | ".join(label for label in labels if label != "add" or not behind)

    def note(self, layer: nn.Module, model: nn.Module) -> str:
        owners = [m for m in model.modules() if any(child is layer for child in m.children())]
        reasons = [
            f"{type(m).__name__}.forward {self.refused[m]}" for m in owners if m in self.refused
        ]
        return self.notes.get(layer) or "; ".join(reasons)

    # What a call of a module may leave pending

    def opened(self, module: nn.Module) -> _Calls:
        if module not in self.concerned:
            return _NONE
        if module not in self._opened:
            self._opened[module] = _NONE  # of a module that calls itself
            try:
                self._opened[module] = self._open(module)
            except Refused as refused:
                self.refused[module] = refused
        return self._opened[module]

    def _open(self, module: nn.Module) -> _Calls:
        cls = self.layers.get(module)
        if cls is not None:
            call = frozenset({_Call(module)})
            return self._in_turn(module, ("drop", "act"), call) if issubclass(cls, Behind) else call
        if "forward" in vars(module):
            raise Refused("was replaced on the instance")
        base: Any = underneath(type(module))
        library = base.__module__.startswith("torch.nn.")
        if all(
            getattr(base, n) is getattr(nn.Sequential, n, None) for n in ("forward", "__iter__")
        ):
            merged(base)
            return self._in_turn(module, module._modules, None)
        if library:
            return _NONE
        merged(base)
        roles = self.roles[module] = {}
        returned = _NONE
        for name, function in self._methods(module, base):
            try:
                tree = rewrite.source(function)
            except Refused as refused:
                if name == "forward":
                    self.refused[module] = refused
                continue
            reader = _ModuleReader(self, module, tree, function)
            editor = rewrite.Editor(tree, reader)
            roles[name] = reader.roles
            if name == "forward":
                returned = editor.returned or _NONE
        return self.through(returned, module)

    def _methods(self, module: nn.Module, base: type) -> Iterator[tuple[str, Any]]:
        """Those of a class that may call a layer."""
        names = {n for n, child in module._modules.items() if child in self.concerned}
        seen = set()
        for cls in base.__mro__[: base.__mro__.index(nn.Module)]:
            for name, function in vars(cls).items():
                if name in seen or name.startswith("__") or cls.__module__.startswith("torch.nn."):
                    continue
                seen.add(name)
                code = getattr(function, "__code__", None)
                if name == "forward" or (code is not None and names & set(code.co_names)):
                    yield name, function

    def through(self, calls: _Calls, module: nn.Module) -> _Calls:
        return frozenset(call._replace(via=(*call.via, module)) for call in calls)

    def _in_turn(self, module: nn.Module, names: Any, calls: _Calls | None) -> _Calls:
        """What calling children one after another leaves pending."""
        for name in list(names):
            child = module._modules[name]
            if child is None:
                continue
            if calls and fuse.is_identity(child):
                continue
            if calls:
                self.consumed(calls, module, child, fuse.activation_of(child))
            self.called.add(child)
            calls = self.opened(child)
        return self.through(calls or _NONE, module)

    # What takes it

    def added(self, calls: _Calls, module: nn.Module) -> _Calls:
        calls = frozenset(call for call in calls if not call.added)  # a layer adds once
        for call in calls:
            if self._may_fuse(call, module):
                self.labels[call.layer].append(("add", module))
        return frozenset(call._replace(added=True) for call in calls)

    def consumed(
        self, calls: _Calls, module: nn.Module, by: Any, activation: Activation | None
    ) -> None:
        for call in calls:
            known = activation is not None or type(by) in fuse.MODULES
            if known:
                self.callers.update((module, *call.via))
            if activation is not None and self._may_fuse(call, module):
                label = f"add + {activation}" if call.added else str(activation)
                self.labels[call.layer].append((label, module))
            elif not call.added:
                name = (
                    type(by).__name__ if isinstance(by, nn.Module) else getattr(by, "__name__", by)
                )
                hooks = isinstance(by, nn.Module) and not fuse.unhooked(by)
                self.notes[call.layer] = f"followed by {name}{' with hooks' if hooks else ''}"

    def lost(self, calls: _Calls, module: nn.Module, waits: bool) -> None:
        for call in calls:
            if waits:  # an add in place may go into another layer's if nobody has seen this one's
                self.callers.update((module, *call.via))
            if not call.added:
                self.notes[call.layer] = "no add or activation alone takes its output at once"

    def _may_fuse(self, call: _Call, module: nn.Module) -> bool:
        self.callers.update((module, *call.via))
        return all(map(fuse.unhooked, (call.layer, *call.via)))

    # What is to be changed

    def changes(self) -> tuple[list[Change], list[nn.Module]]:
        """The callers' new classes, and those of them that have one."""
        changes: list[Change] = []
        fusing: list[nn.Module] = []
        for module in self.callers - self.layers.keys():
            cls, base = type(module), underneath(type(module))
            new = self._rewritten(module, base) if module in self.roles else fuse.chained(base)
            fusing.append(module)
            if cls is not new and (cls is base or is_derived(cls)):
                changes.append((module, "__class__", new))
        return changes, fusing

    def _rewritten(self, module: nn.Module, base: type) -> type:
        methods = {n: r for n, r in self.roles[module].items() if "opens" in r.values()}
        return rewrite.rewritten(
            base,
            tuple((name, tuple(sorted(roles.items()))) for name, roles in sorted(methods.items())),
        )


class _ModuleReader(rewrite.Reader):
    """What a module's own parts are, at the time of reading."""

    def __init__(
        self, search: Search, module: nn.Module, tree: ast.FunctionDef, function: Any
    ) -> None:
        super().__init__(function)
        self.search, self.module, self.function = search, module, function
        arguments = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
        self.me = arguments[0]
        bound = {
            n.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)
        }
        self.local = {*(a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)), *bound} - {
            self.me
        }
        if self.me in bound:
            self.local.add(self.me)
        free = function.__code__.co_freevars
        self.closure = dict(zip(free, function.__closure__ or (), strict=True))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                search.called.update(self._modules(node.func))
            elif isinstance(node, ast.Subscript):
                search.walked.update(self._modules(node.value))
            elif isinstance(node, ast.For | ast.comprehension):
                for part in ast.walk(node.iter):
                    search.walked.update(self._modules(part))

    def _modules(self, node: ast.AST) -> list[nn.Module]:
        found = self.find(node) if isinstance(node, ast.expr) else None
        return [found] if isinstance(found, nn.Module) else []

    def find(self, node: ast.expr) -> Any:
        """What an expression is, where that does not depend on what the function is given."""
        try:
            return self._find(node)
        except Exception:  # whatever a property of the module makes of being asked
            return _UNKNOWN

    def _find(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id in self.local:
                return _UNKNOWN
            if node.id == self.me:
                return self.module
            if node.id in self.closure:
                return self.closure[node.id].cell_contents
            names = self.function.__globals__
            return names[node.id] if node.id in names else getattr(builtins, node.id)
        if isinstance(node, ast.Attribute):
            owner = self._find(node.value)
            fixed = isinstance(owner, nn.Module | types.ModuleType)
            return getattr(owner, node.attr) if fixed and node.attr != "training" else _UNKNOWN
        if isinstance(node, ast.Subscript):
            owner, index = self._find(node.value), self._find(node.slice)
            fixed = isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict)
            return owner[index] if fixed and index is not _UNKNOWN else _UNKNOWN
        return _UNKNOWN

    def takes(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.takes(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self.takes(part) for part in test.values]
            deciding = isinstance(test.op, ast.Or)
            if deciding in parts:
                return deciding
            return None if None in parts else not deciding
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot):
            left, right = self.find(test.left), self.find(test.comparators[0])
            if len(test.ops) > 1 or left is _UNKNOWN or right is _UNKNOWN:
                return None
            return (left is right) is isinstance(test.ops[0], ast.Is)
        found = self.find(test)
        if found is None or isinstance(found, bool | int | float | str):
            return bool(found)
        plain = isinstance(found, nn.Module) and not hasattr(type(found), "__len__")
        return True if plain else None

    def role(self, callee: ast.expr) -> str | None:
        found, role = self.find(callee), None
        if isinstance(found, nn.Module) and self.search.opened(found):
            role = "opens"
        elif fuse.passes(found):
            role = "passes"
        elif type(found) in fuse.MODULES or (callable(found) and fuse.is_activation(found)):
            role = "activates"
        if role is not None:
            self.roles[ast.unparse(callee)] = role
        return role

    def opened(self, callee: ast.expr) -> Any:
        return _NONE if self.untaken else self.search.opened(self.find(callee))

    def added(self, layers: Any, other: ast.expr) -> Any:
        number = isinstance(self.find(other), int | float)
        if isinstance(other, ast.Call) and isinstance(other.func, ast.Attribute):
            number = other.func.attr in _NUMBERS
        return _NONE if self.untaken or number else self.search.added(layers, self.module)

    def consumed(self, layers: Any, by: ast.Call | None, role: str | None) -> None:
        if self.untaken:
            return
        if by is None:
            self.search.lost(layers, self.module, role == "waits")
            return
        callee: Any = by.func
        found = self.find(callee)
        activation = None
        if role == "activates":
            if not by.args and not by.keywords:
                activation = Activation(fuse.METHODS[callee.attr])
            else:
                options = {str(k.arg): self.find(k.value) for k in by.keywords}
                values = tuple(map(self.find, by.args[1:]))
                activation = fuse.activation_of(found, values, options)
        if found is _UNKNOWN:
            found = ast.unparse(callee)
        self.search.consumed(layers, self.module, found, activation)
