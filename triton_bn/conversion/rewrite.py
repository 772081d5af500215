"""Reading a module's ``forward`` as a graph, and giving one module a ``forward`` of its own.

Reading is done by ``torch.fx``, one module at a time and with all its children opaque, so that a
model of which nothing but one block can be traced is still read in that block. fx alone proves
nothing: it runs ``forward`` once, and what that run decided (``isinstance``, ``is None``,
``with torch.no_grad()``, a value left on ``self``) is silently missing in the graph. So the source
is read first, and only straight-line code passes: branches that ask for nothing but the module's
own structure, calls of submodules, of PyTorch's operations and of tensor methods.

A module gets another ``forward`` by getting another class: a subclass of the one it has, of the
same name, made for it. PyTorch does the same for parametrizations. Unlike a function put on the
instance it stays right when the module is copied, replicated, traced or compiled, and unlike a
``GraphModule`` it leaves the module what it was: ``isinstance``, attributes, methods, state_dict.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import operator
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "Refused",
    "chain",
    "is_derived",
    "merged",
    "original",
    "require_subclassable",
    "rewritten",
    "trace",
]


class Refused(Exception):
    """Why a forward is not read or not replaced. The text completes "its forward ..."."""


# ------------------------------------------------------------------------------ reading the source

_STATEMENTS = (
    ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return,
    ast.If, ast.For, ast.Pass, ast.Assert, ast.Raise,
)  # fmt: skip
_EXPRESSIONS = (
    ast.Call, ast.Attribute, ast.Subscript, ast.Name, ast.Constant, ast.Tuple, ast.List,
    ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Starred, ast.Slice,
    ast.JoinedStr, ast.FormattedValue,
)  # fmt: skip
_IDENTITY = (ast.Is, ast.IsNot, ast.In, ast.NotIn)
#: Those that :class:`_Proxy` records.
_IN_PLACE = (ast.Add, ast.Sub, ast.Mult, ast.Div)
#: Of Python's own functions, those that fx refuses to apply to what forward is given.
_BUILTINS = (isinstance, len, range, zip, enumerate, reversed, list, tuple, int, float)
#: Where PyTorch's operations live: a call of one becomes one node of the graph.
_OPERATIONS = (
    "torch", "torch.nn.functional", "torch.functional", "torch._C._nn", "_operator", "math",
)  # fmt: skip
_CONSTANT = (ModuleType, bool, int, float, str, tuple, type(None))
_CHILDREN = ("children", "named_children", "values", "items")

#: Stand for what is known of a value without running anything.
_CHILD, _RESULT = object(), object()


def _require_straight(
    module: nn.Module, function: Any, method: bool = True, reading: tuple[Any, ...] = ()
) -> None:
    """Raises :class:`Refused` unless a run on stand-ins decides nothing by what they are.

    ``method``: whether the function's first argument is the module.
    """
    if function in reading:
        raise Refused("calls itself")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise Refused("has no source to read") from error
    wrapped = hasattr(function, "__wrapped__")
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or wrapped:
        raise Refused("is decorated")
    given = tree.args
    if given.vararg or given.kwarg or given.kwonlyargs:
        raise Refused("takes more than plain arguments")
    arguments = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    me = arguments.pop(0) if method else None
    nodes = [node for statement in tree.body for node in ast.walk(statement)]
    stored = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    varying = {*arguments, *stored}

    def is_fixed(node: ast.AST) -> bool:
        """Whether a value depends on the module's structure only, not on what forward is given."""
        return not any(isinstance(n, ast.Name) and n.id in varying for n in ast.walk(node))

    def value(node: ast.AST) -> Any:
        """What an expression will be: the object itself, a child of the module, or a result."""
        if isinstance(node, ast.Name):
            if node.id == me:
                return module
            if node.id in stored or node.id in arguments:
                return _RESULT if node.id in varying else _CHILD
            return function.__globals__.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Attribute):
            owner = value(node.value)
            return owner if owner is _CHILD or owner is _RESULT else getattr(owner, node.attr, None)
        if isinstance(node, ast.Subscript):
            owner = value(node.value)
            return _CHILD if owner is _CHILD or isinstance(owner, nn.Module) else _RESULT
        return _RESULT

    # The names of a loop over the module's own children are as fixed as they are.
    for node in nodes:
        if isinstance(node, ast.For) and is_fixed(node.iter):
            loops_over = [value(n) for n in ast.walk(node.iter) if isinstance(n, ast.Attribute)]
            if not any(isinstance(container, list | tuple | dict) for container in loops_over):
                names = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
                varying -= {name for name in names if stored.count(name) == 1}

    def asks(node: ast.AST) -> bool:
        """Whether it tells a stand-in from what it stands for, or looks at what may change."""
        if isinstance(node, ast.Name):
            found = value(node)
            known = found is _CHILD or found is _RESULT or isinstance(found, _CONSTANT)
            return not known and not callable(found)
        if isinstance(node, ast.Attribute):
            other = node.attr == "training" and value(node.value) is not module
            return other or node.attr.startswith("__")
        if isinstance(node, ast.Compare):
            return not is_fixed(node) and any(isinstance(op, _IDENTITY) for op in node.ops)
        return isinstance(node, ast.Call) and value(node.func) is isinstance and not is_fixed(node)

    def require_callable(call: ast.Call) -> None:
        called, text = value(call.func), ast.unparse(call.func)
        owner = value(call.func.value) if isinstance(call.func, ast.Attribute) else None
        if called is _CHILD or isinstance(called, nn.Module):
            return
        if called is None and isinstance(owner, nn.Module):
            return  # an optional part that this module lacks; a branch not taken
        if owner is _RESULT or isinstance(owner, Tensor | str):
            return
        if isinstance(owner, nn.Module) and text.rpartition(".")[2] in _CHILDREN:
            return
        if owner is module and inspect.ismethod(called):
            _require_straight(module, called.__func__, True, (*reading, function))
            return
        if any(called is known for known in _BUILTINS):
            return
        if isinstance(called, type) and issubclass(called, BaseException):
            return
        if _is_operation(called) or text in ("torch.jit.is_scripting", "torch.jit.is_tracing"):
            return
        if inspect.isfunction(called) and not called.__module__.startswith("torch."):
            _require_straight(module, called, False, (*reading, function))
            return
        raise Refused(f"calls `{text}`")

    for node in nodes:
        if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS):
            raise Refused(f"has a `{type(node).__name__.lower()}` statement")
        if isinstance(node, ast.expr) and not isinstance(node, _EXPRESSIONS):
            raise Refused(f"has an expression too involved to follow: `{ast.unparse(node)}`")
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            raise Refused(f"assigns to `{ast.unparse(node)}`")
        if isinstance(node, ast.AugAssign) and not isinstance(node.op, _IN_PLACE):
            raise Refused(f"has `{ast.unparse(node)}`, which fx takes for another operation")
        if asks(node):
            raise Refused(f"asks for `{ast.unparse(node)}`")
        if isinstance(node, ast.Call):
            require_callable(node)


def _is_operation(called: Any) -> bool:
    """Whether fx records a call of it as one node, whatever it does inside."""
    where, name = getattr(called, "__module__", None), getattr(called, "__name__", "")
    if where not in _OPERATIONS or isinstance(called, type):
        return False
    if where == "torch" and not inspect.isbuiltin(called):
        return called is torch._assert
    return not name.startswith(("is_", "get_", "set_"))


# ----------------------------------------------------------------------------------- the graph


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


class _Proxy(fx.Proxy):
    """fx takes ``x += y`` for ``x = x + y``: another result where ``x`` has a second name."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(module: nn.Module) -> fx.Graph:
    """What ``module.forward`` does, in terms of calls of its submodules, functions and methods.

    Raises:
        Refused: where the graph would not be the whole truth.
    """
    _require_straight(module, type(module).forward)
    was, before = module.training, dict(vars(module))
    try:
        graphs = []
        for mode in (True, False):
            vars(module)["training"] = mode
            graphs.append(_Tracer().trace(module))
    except Exception as error:  # whatever forward makes of the stand-ins
        raise Refused(f"does not trace: {error}") from error
    finally:
        left_behind = vars(module).keys() - before.keys()
        for name in left_behind:
            del vars(module)[name]
        vars(module)["training"] = was
    if left_behind:  # fx keeps a tensor that was computed from nothing but constants on the module
        raise Refused("makes a tensor of its own")
    return _with_training(*graphs)


def _with_training(train: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """One graph for both modes: an argument that is the mode is read from the module again."""
    if len(train.nodes) != len(evaluation.nodes):
        raise Refused("does different things in training and in evaluation")
    for a, b in zip(train.nodes, evaluation.nodes, strict=True):
        flags = (a.op, a.target, len(a.args), *a.kwargs) == (b.op, b.target, len(b.args), *b.kwargs)
        arguments = [*a.args, *a.kwargs.values()]
        others = [*b.args, *b.kwargs.values()]
        merged: list[Any] = []
        for mine, other in zip(arguments, others, strict=False):
            if mine is True and other is False:
                with train.inserting_before(a):
                    merged.append(train.create_node("get_attr", "training"))
            else:
                flags = flags and _text(mine) == _text(other)
                merged.append(mine)
        if not flags:
            raise Refused("does different things in training and in evaluation")
        a.args = tuple(merged[: len(a.args)])
        a.kwargs = dict(zip(a.kwargs, merged[len(a.args) :], strict=True))
    return train


def _text(argument: Any) -> str:
    return repr(fx.node.map_arg(argument, lambda node: f"%{node.name}"))


def chain(*sequences: Iterable[str]) -> fx.Graph:
    """The graph of calling children one after another, as ``nn.Sequential`` does; a row each."""
    graph, ends = fx.Graph(), []
    for keys in sequences:
        node = graph.placeholder("input")
        for key in keys:
            node = graph.call_module(key, (node,))
        ends.append(node)
    graph.output(ends[0] if len(ends) == 1 else tuple(ends))
    return graph


# ---------------------------------------------------------------------------------- new classes


def require_subclassable(cls: type, graph: fx.Graph) -> None:
    """Raises :class:`Refused` where :func:`rewritten` would fail."""
    merged(cls)
    defaults = [node.args[0] for node in graph.nodes if node.op == "placeholder" and node.args]
    if not all(isinstance(default, bool | int | float | str | None) for default in defaults):
        raise Refused("has a default that is no plain number")


def rewritten(cls: type, graph: fx.Graph) -> type:
    """A subclass of ``cls`` whose forward is the graph, which may not be used any more."""
    for node in graph.nodes:
        node.type = None  # annotations need names that the source would have to import
    code = graph.python_code("self")
    used = compile(code.src, "<forward>", "exec")
    names = {*used.co_names, *(n for c in used.co_consts for n in getattr(c, "co_names", ()))}
    scope = tuple(
        (name, f"module {value.__name__}" if isinstance(value, ModuleType) else value)
        for name, value in code.globals.items()
        if name in names
    )
    return _rewritten(cls, code.src.strip() + "\n", scope)


@cache
def merged(cls: type, *fronts: type) -> type:
    """A subclass of ``cls`` where the methods of ``fronts`` come first.

    Raises:
        Refused: where ``cls`` cannot be subclassed so that its objects still copy and pickle.
    """
    return _derive((*fronts, cls), {}, (merged, cls, *fronts))


@cache
def _rewritten(cls: type, source: str, scope: tuple[tuple[str, Any], ...]) -> type:
    file = f"<triton_bn: {cls.__qualname__}.forward {len(linecache.cache)}>"
    # Under this name tracebacks and inspect.getsource find the lines.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {
        name: import_module(value.split()[1]) if isinstance(value, str) else value
        for name, value in scope
    }
    exec(compile(source, file, "exec"), names)
    return _derive((cls,), {"forward": names["forward"]}, (_rewritten, cls, source, scope))


_RECIPE = "_triton_bn_recipe"


def _derive(bases: tuple[type, ...], body: dict[str, Any], recipe: tuple[Any, ...]) -> type:
    """The class that ``recipe`` makes: a function here, the class it starts from, the rest."""
    cls = bases[-1]
    pickling = ("__reduce__", "__reduce_ex__")
    if any(getattr(cls, name) is not getattr(object, name) for name in pickling):
        raise Refused("belongs to a class that pickles in a way of its own")

    def reduce(self: Any, protocol: Any) -> Any:
        """As any object's, but for the class: no import finds it, so it is made again."""
        reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        _, (_, *arguments), *state = reduced
        return _make, (recipe, *arguments), *state

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    try:
        body = {**names, **body, "__reduce_ex__": reduce, _RECIPE: recipe}
        return type(cls)(cls.__name__, bases, body)
    except TypeError as error:
        raise Refused(f"belongs to a class that cannot be subclassed: {error}") from error


def _make(recipe: tuple[Any, ...], *arguments: Any) -> Any:
    maker, *how = recipe
    cls = maker(*how)
    return cls.__new__(cls, *arguments)


def is_derived(cls: type) -> bool:
    """Whether the class was made here."""
    return _RECIPE in vars(cls)


def original(cls: type) -> type:
    """The class that one made here started from."""
    start: type = vars(cls)[_RECIPE][1]
    return start
