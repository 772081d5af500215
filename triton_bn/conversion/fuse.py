"""What follows a layer, and how the layer takes it up: the search for adds and activations.

Nothing here knows batch normalization. A *layer* is a module that may be given an ``activation``
and whose ``forward(input, residual=None)`` then is ``activation(f(input) + residual)``.

An activation module that is called in one place only is replaced by :class:`Folded`, an identity
that keeps it, and ``forward`` stays as it is (``nn.Sequential``, a network's stem). For the rest
(an add, a functional activation, one ReLU module called twice) ``forward`` is traced, edited and
put into a subclass of the module's class (:mod:`triton_bn.conversion.rewrite`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from triton_bn.conversion import rewrite
from triton_bn.conversion.rewrite import Refused
from triton_bn.problem import Activation

__all__ = ["Change", "Folded", "Search", "changes", "hooked", "in_place", "module_activation"]

#: A module and ``"__class__"``, or a dictionary and a key; and the new value.
Change = tuple[Any, str, Any]

#: Modules whose forward is not straight-line code: which children it calls right after one another.
_KNOWN = {
    "torchvision.models.densenet._DenseLayer": ("norm1 relu1 conv1", "norm2 relu2 conv2"),
    "timm.models.resnet.ResNet": ("bn1 act1",),
}


# ------------------------------------------------------------------- what stands in a fused model


class Folded(nn.Identity):
    """Stands where an activation stood that the layer before it now applies.

    ``activation`` is that module (no submodule of this one, so that state_dict keeps its keys).
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        vars(self)["activation"] = activation
        self.training = activation.training

    def extra_repr(self) -> str:
        return repr(vars(self)["activation"])


def in_place(result: Tensor, target: Tensor) -> Tensor:
    """What ``target += ...`` would have left in ``target``: of its shape and dtype."""
    if has_torch_function((result, target)):  # one call to those who record calls, as torch.fx does
        return handle_torch_function(in_place, (result, target), result, target)
    if result.shape != target.shape:
        raise RuntimeError(
            f"output with shape {list(target.shape)} doesn't match the broadcast shape "
            f"{list(result.shape)}"
        )
    return result if result.dtype == target.dtype else result.to(target.dtype)


class _Tail(nn.Sequential):
    """``nn.Sequential`` whose last child takes a residual."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        *head, last = self
        for module in head:
            input = module(input)
        return last(input) if residual is None else self._add(last, input, residual)

    def _add(self, last: Any, input: Tensor, residual: Tensor) -> Tensor:
        sum: Tensor = last(input, residual)
        return sum


class _InPlaceTail(_Tail):
    """The same, where the residual was added in place to what the last child gave."""

    def _add(self, last: Any, input: Tensor, residual: Tensor) -> Tensor:
        return in_place(last(input, residual), input)


# --------------------------------------------------------------------------------- the activations

#: What they take beside their input, as arguments and as attributes; the others take ``inplace``.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "leaky_relu": ("negative_slope", "inplace"),
    "elu": ("alpha", "inplace"),
    "hardtanh": ("min_val", "max_val", "inplace"),
    "gelu": ("approximate",),
    "sigmoid": (),
    "tanh": (),
}
_MODULES: dict[type, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.GELU: "gelu", nn.ELU: "elu", nn.Mish: "mish",
    nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
}  # fmt: skip
_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in set(_MODULES.values())},
    **{getattr(F, f"{name}_"): name for name in ("relu", "elu", "leaky_relu", "hardtanh")},
    **{getattr(torch, name): name for name in ("relu", "sigmoid", "tanh")},
    **{getattr(torch, f"{name}_"): name for name in ("relu", "sigmoid", "tanh")},
}
_METHODS: dict[Any, str] = {
    f"{name}{tail}": name for name in ("relu", "sigmoid", "tanh") for tail in ("", "_")
}


def _activation(name: str, options: dict[str, Any]) -> Activation | None:
    """What a function of torch.nn.functional with these arguments is, if it is one of ours."""
    if name == "hardtanh":
        bounds = options.get("min_val", -1.0), options.get("max_val", 1.0)
        return Activation("relu6") if bounds == (0.0, 6.0) else None
    if name == "gelu":
        return Activation("gelu") if options.get("approximate", "none") == "none" else None
    parameter = options.get("negative_slope" if name == "leaky_relu" else "alpha")
    return Activation(name, parameter) if isinstance(parameter, float | int | None) else None


def module_activation(module: nn.Module) -> Activation | None:
    """What an activation module of torch.nn is, if it is one of ours and nobody looks at it."""
    name = _MODULES.get(type(module))
    if name is None or hooked(module):
        return None
    return _activation(name, {option: getattr(module, option) for option in _OPTIONS.get(name, ())})


def _function_activation(node: fx.Node) -> Activation | None:
    name = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
    if name is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    names = _OPTIONS.get(name, ("inplace",))
    if len(node.args) - 1 > len(names) or not node.kwargs.keys() <= set(names):
        return None
    return _activation(name, {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs})


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes in or comes out, or has put a forward on the instance."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


# ----------------------------------------------------------------------------- what follows a layer


@dataclass(eq=False)
class _Body:
    """What is known of a module's forward."""

    module: nn.Module
    graph: fx.Graph
    kind: Literal["traced", "sequential", "known", "graph module"]

    @property
    def whole(self) -> bool:
        """Whether the graph is all that forward does."""
        return self.kind != "known"

    @property
    def returned(self) -> Any:
        return next(iter(reversed(self.graph.nodes))).args[0]

    def child(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def activation(self, node: fx.Node) -> Activation | None:
        child = self.child(node)
        return _function_activation(node) if child is None else module_activation(child)

    def is_identity(self, node: fx.Node) -> bool:
        child = self.child(node)
        return child is not None and type(child) in (nn.Identity, Folded) and not hooked(child)

    def source(self, node: Any) -> Any:
        """Where a value comes from: back through identities, as long as nothing else takes it."""
        while isinstance(node, fx.Node) and self.is_identity(node) and len(node.users) == 1:
            node = node.args[0]
        return node

    def user(self, node: fx.Node) -> fx.Node:
        """What takes a value that is taken once, past identities."""
        (user,) = node.users
        return self.user(user) if self.is_identity(user) and len(user.users) == 1 else user

    def between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """The calls after ``first`` and before ``last`` that do anything."""
        nodes = list(self.graph.nodes)
        nodes = nodes[nodes.index(first) + 1 : nodes.index(last)]
        return [n for n in nodes if n.op.startswith("call") and not self.is_identity(n)]


#: The calls on the way to a layer: of a child, of a child of that child, ..., of the layer itself.
_Path = list[tuple[_Body, fx.Node]]


@dataclass(eq=False)
class _Fold:
    """What a layer takes up: an add of which it is operand ``side``, an activation, or both."""

    path: _Path
    add: fx.Node | None
    side: int
    act: fx.Node | None
    activation: Activation | None

    def __str__(self) -> str:
        parts = ["add" if self.add is not None else None, self.activation]
        return " + ".join(str(part) for part in parts if part is not None)


def _adds(node: fx.Node) -> bool:
    """Whether it adds two values and does nothing else."""
    if node.op == "call_function":
        known = node.target in (operator.add, operator.iadd, torch.add)
    else:
        known = node.op == "call_method" and node.target in ("add", "add_")
    plain = len(node.args) == 2 and not node.kwargs
    return known and plain and all(isinstance(operand, fx.Node) for operand in node.args)


def _adds_in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


#: Methods and functions of a tensor that give no tensor.
_NUMBERS = {"dim", "item", "ndimension", "nelement", "numel", "size", "storage_offset", "stride"}


def _is_tensor(node: fx.Node) -> bool:
    """Whether it is surely no Python number, which an add takes and a layer does not."""
    if node.op == "call_module" or any(user.op == "call_module" for user in node.users):
        return True
    if node.op == "call_method":
        return node.target not in _NUMBERS
    if node.op == "call_function" and getattr(node.target, "__name__", None) not in _NUMBERS:
        module = str(getattr(node.target, "__module__", ""))
        computes = module == "_operator" and node.target is not operator.getitem
        operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
        return module.startswith("torch") or (computes and any(map(_is_tensor, operands)))
    return node.type is Tensor or str(node.type).rpartition(".")[2] == "Tensor"


class Search:
    """Finds what each of ``layers`` may take up. Changes nothing of the model.

    Who calls a layer or an activation is told by the forwards that can be read. Of the others one
    thing is assumed: that they do not reach into a module for its children instead of calling it.
    """

    def __init__(self, model: nn.Module, layers: set[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.folds: dict[nn.Module, _Fold] = {}
        #: Why a layer does not take up an add or activation that does follow it.
        self.notes: dict[nn.Module, str] = {}
        self.owners: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            for child in module._modules.values():
                if child is not None:
                    self.owners[child].append(module)
        self.bodies: dict[nn.Module, _Body] = {}
        self.refusals: dict[nn.Module, Refused] = {}
        for module in model.modules():
            if self._concerns(module):
                try:
                    self.bodies[module] = _read(module)
                except Refused as refused:
                    self.refusals[module] = refused
        self.sites = self._sites()
        for module in [module for module in self.bodies if self._is_only_iterated(module)]:
            del self.bodies[module]
        self.sites = self._sites()
        for body in self.bodies.values():
            for node in body.graph.nodes:
                if _adds(node):
                    self._match_add(body, node)
                elif body.activation(node) is not None:
                    self._match_activation(body, node)

    def _concerns(self, module: nn.Module) -> bool:
        library = type(module).__module__.startswith("torch.nn.")
        if module in self.layers or (library and not isinstance(module, nn.Sequential)):
            return False
        return any(child in self.layers for child in module.modules())

    def _sites(self) -> dict[nn.Module, _Path]:
        """Where each module is called."""
        sites: dict[nn.Module, _Path] = defaultdict(list)
        for body in self.bodies.values():
            for node in body.graph.nodes:
                child = body.child(node)
                if child is not None:
                    sites[child].append((body, node))
        return sites

    def _is_only_iterated(self, module: nn.Module) -> bool:
        """Whether an ``nn.Sequential`` is never called: its children are, by who holds it."""
        if self.bodies[module].kind != "sequential" or module is self.model or self.sites[module]:
            return False
        bodies = [self.bodies.get(caller) for caller in self._callers(module)]
        return all(body is not None and body.whole for body in bodies)

    def _callers(self, module: nn.Module) -> list[nn.Module]:
        """The modules that hold it, past those that do nothing but hold."""
        found: list[nn.Module] = []
        for owner in self.owners[module]:
            only_holds = type(owner) in (nn.ModuleList, nn.ModuleDict)
            found += self._callers(owner) if only_holds else [owner]
        return found

    # What matches

    def _refusal(self, layer: nn.Module, node: fx.Node) -> str | None:
        """Why a layer can take up nothing, whatever follows this call of it."""
        if hooked(layer):
            return "it has hooks"
        if len(self.owners[layer]) > 1:
            return f"it is registered in {len(self.owners[layer])} places"
        if len(self.sites[layer]) > 1:
            return f"it is called in {len(self.sites[layer])} places"
        if len(node.args) != 1 or node.kwargs:
            return "it is called with more than an input"
        if len(node.users) != 1:
            return f"its output is used in {len(node.users)} places"
        return None

    def _path(self, body: _Body, node: Any) -> _Path | None:
        """The way to the layer that computes a value, where that is free to take up more."""
        child = body.child(node) if isinstance(node, fx.Node) else None
        if child is None or child in self.folds:
            return None
        if child in self.layers:
            return None if self._refusal(child, node) else [(body, node)]
        inner = self.bodies.get(child)
        once = len(node.users) == len(self.owners[child]) == len(self.sites[child]) == 1
        if inner is None or not inner.whole or not once or hooked(child):
            return None
        rest = self._path(inner, inner.source(inner.returned))
        return [(body, node), *rest] if rest else None

    def _match_activation(self, body: _Body, node: fx.Node) -> None:
        path = self._path(body, body.source(node.args[0])) if node.args else None
        if path is None:
            return
        if self.place(body, node) is not None or self._may_write(body):
            self.folds[_end(path)] = _Fold(path, None, 0, node, body.activation(node))
        else:
            self.notes[_end(path)] = "the activation behind it cannot be taken out of its place"

    def _match_add(self, body: _Body, node: fx.Node) -> None:
        paths = [self._path(body, body.source(operand)) for operand in node.args]
        # Rather a layer called here than one in a child, which must be made to pass a residual on.
        for side in sorted((0, 1), key=lambda side: len(paths[side] or ())):
            path = paths[side]
            if path is None:
                continue
            refusal = self._add_refusal(body, node, side, path, paths[1 - side])
            if refusal is not None:
                self.notes[_end(path)] = refusal
                continue
            act = body.user(node) if len(node.users) == 1 else None
            activation = body.activation(act) if act is not None else None
            act = act if activation is not None else None
            self.folds[_end(path)] = _Fold(path, node, side, act, activation)
            return

    def _add_refusal(
        self, body: _Body, node: fx.Node, side: int, path: _Path, other_path: _Path | None
    ) -> str | None:
        start, other = path[0][1], node.args[1 - side]
        assert isinstance(other, fx.Node)
        if body.source(other) is start:
            return "it is added to itself"
        if not _is_tensor(other):
            return "what is added may be a number"
        if _adds_in_place(node) and side == 1 and other_path is None:
            return "it is added in place to a value that may be seen elsewhere"
        inner = (body for body, _ in path[1:])
        if not self._may_write(body) or not all(self._may_write(b, passing=True) for b in inner):
            return "the add is in a forward that cannot be replaced"
        movable = len(path) == 1 and self._is_alone(body, start.args[0])
        if body.between(start, node) and not movable:
            return "something runs between it and the add"
        return None

    def _is_alone(self, body: _Body, node: Any) -> bool:
        """Whether a value is new memory for one call only: that call may be made later."""
        child = body.child(node) if isinstance(node, fx.Node) else None
        is_new = isinstance(child, nn.modules.conv._ConvNd | nn.Linear) and not hooked(child)
        return is_new and len(node.users) == 1

    def _may_write(self, body: _Body, passing: bool = False) -> bool:
        """Whether a forward may be replaced; ``passing``: by one that takes a residual, too."""
        if body.kind != "traced" and not (passing and body.kind == "sequential"):
            return False
        try:
            rewrite.require_subclassable(type(body.module), body.graph)
        except Refused:
            return False
        names = [node.target for node in body.graph.nodes if node.op == "placeholder"]
        return not passing or "residual" not in names

    def place(self, body: _Body, node: fx.Node) -> tuple[nn.Module, str] | None:
        """Where an activation may be replaced by :class:`Folded`: who holds it, and as what."""
        child = body.child(node)
        if child is None:
            return None
        if body.kind in ("sequential", "known"):  # called by key: another key is another place
            alone = all(other.kind in ("sequential", "known") for other, _ in self.sites[child])
        else:
            alone = len(self.sites[child]) == len(self.owners[child]) == 1
        path, _, key = str(node.target).rpartition(".")
        return (body.module.get_submodule(path), key) if alone else None

    def note(self, layer: nn.Module) -> str:
        """Why a layer takes up nothing."""
        if layer in self.notes:
            return self.notes[layer]
        if not self.sites[layer]:
            names = {m: type(m).__name__ for m in self._callers(layer) if m in self.refusals}
            reasons = [f"{name}.forward {self.refusals[m]}" for m, name in names.items()]
            return "; ".join(reasons) or "no forward that can be read calls it"
        body, node = self.sites[layer][0]
        refusal = self._refusal(layer, node)
        if refusal is not None:
            return refusal
        user = body.user(node)
        if user.op == "output":
            return f"{type(body.module).__name__} returns it" if body.whole else ""
        child = body.child(user)
        if child is None:
            return f"followed by {getattr(user.target, '__name__', user.target)}"
        return f"followed by {type(child).__name__}" + (" with hooks" if hooked(child) else "")


def _end(path: _Path) -> nn.Module:
    body, node = path[-1]
    layer = body.child(node)
    assert layer is not None
    return layer


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _read(module: nn.Module) -> _Body:
    """What is known of the module's forward; :class:`Refused` says why that is nothing."""
    cls = type(module)
    if "forward" in vars(module):
        raise Refused("was replaced on the instance")
    if rewrite.is_derived(cls):
        raise Refused("was rewritten before")
    if isinstance(module, fx.GraphModule):
        return _Body(module, module.graph, "graph module")
    if cls.forward is nn.Sequential.forward:
        return _Body(module, rewrite.chain(module._modules), "sequential")
    try:
        return _Body(module, rewrite.trace(module), "traced")
    except Refused:
        if qualified(cls) not in _KNOWN:
            raise
    rows = (row.split() for row in _KNOWN[qualified(cls)])
    return _Body(module, rewrite.chain(*rows), "known")


# ---------------------------------------------------------------------------------------- fusing


def changes(search: Search) -> tuple[list[Change], list[nn.Module]]:
    """What brings the folds about, and the modules whose forward is rewritten."""
    found: list[Change] = []
    taken: dict[_Body, list[_Fold]] = defaultdict(list)
    #: Who passes a residual on: to which call, and whether it was added to the result in place.
    passing: dict[_Body, tuple[fx.Node, bool]] = {}
    for layer, fold in search.folds.items():
        if fold.activation is not None:
            found.append((vars(layer), "activation", fold.activation))
        taken[fold.path[0][0]].append(fold)
        if fold.add is not None:
            into_layer = _adds_in_place(fold.add) and fold.side == 0
            for body, node in fold.path[1:]:
                passing[body] = node, into_layer and node is fold.path[-1][1]
    written: list[nn.Module] = []
    for body in search.bodies.values():
        cls: Any = type(body.module)
        places = [search.place(body, fold.act) for fold in taken[body] if fold.act is not None]
        adds = any(fold.add is not None for fold in taken[body])
        if body.kind == "traced" and (adds or None in places or body in passing):
            for fold in taken[body]:
                _edit(fold)
            if body in passing:
                _pass_on(body.graph, *passing[body])
            cls = rewrite.rewritten(cls, body.graph)
            found.append((body.module, "__class__", cls))
            written.append(body.module)
            continue
        for place in places:
            assert place is not None
            owner, key = place
            activation = owner._modules[key]
            assert activation is not None
            found.append((owner._modules, key, Folded(activation)))
        if body in passing:
            front = _InPlaceTail if passing[body][1] else _Tail
            cls = rewrite.merged(cls, front)
            found.append((body.module, "__class__", cls))
            written.append(body.module)
    return found, written


def _edit(fold: _Fold) -> None:
    """Takes add and activation out of the graph, and gives the layer's call the residual."""
    body, call = fold.path[0]
    result = call
    if fold.add is not None:
        operand, other = fold.add.args[fold.side], fold.add.args[1 - fold.side]
        # Called where the add was: the residual may be computed after the layer's own turn.
        with body.graph.inserting_before(fold.add):
            result = body.graph.call_module(str(call.target), call.args, {"residual": other})
            if _adds_in_place(fold.add) and fold.side == 1:
                result = body.graph.call_function(in_place, (result, other))
            elif _adds_in_place(fold.add) and len(fold.path) == 1:
                result = body.graph.call_function(in_place, (result, call.args[0]))
        _take_out(body.graph, fold.add, operand, call, result)
        body.graph.erase_node(call)
    if fold.act is not None:
        _take_out(body.graph, fold.act, fold.act.args[0], result, result)


def _take_out(
    graph: fx.Graph, node: fx.Node, operand: Any, start: fx.Node, result: fx.Node
) -> None:
    """Puts ``result`` in the place of ``node`` and of the identities between ``start`` and it."""
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    while operand is not start:
        identity, operand = operand, operand.args[0]
        graph.erase_node(identity)


def _pass_on(graph: fx.Graph, call: fx.Node, adds_in_place: bool) -> None:
    """Gives forward an argument ``residual`` that goes to one call."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        residual = graph.placeholder("residual", default_value=None)
    call.kwargs = {"residual": residual}
    if adds_in_place:
        with graph.inserting_after(call):
            result = graph.call_function(in_place, (call, call.args[0]))
        call.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
