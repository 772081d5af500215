"""A forward's source, edited: calls of layers, and what takes their results, become calls that fuse.

``self.relu(self.bn1(x))`` becomes ``call(self.relu, call(self.bn1, x))`` and ``out += identity``
``out = add_in_place(out, identity)`` (:mod:`triton_bn.conversion.fuse`); every other line stays, and
nothing is frozen: attributes, branches, globals and closures are read where they were read.

A local name may hold a pending call then. That the result is the original's rests on three rules,
which are checked statement by statement:

- A pending call is made before anything is done that could tell: before any other call, and at the
  end of what is read here (loops, ``with``). Only plain expressions are evaluated in between:
  names, attributes, constants and operators, of which it is required that they change nothing.
- A name whose value is given to an add or activation is not read again: it is overwritten by that
  statement, or nothing that comes later reads it.
- Whatever else reads the name makes the call.

What cannot be read so (``try``, nested functions, a name that they see) stays as it is.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import inspect
import textwrap
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from triton_bn.conversion import fuse
from triton_bn.conversion.derive import Refused, derived

__all__ = ["Editor", "Reader", "rewritten", "source"]

#: In an edited function: :mod:`triton_bn.conversion.fuse`.
_FUSE = "_triton_bn_fuse"
_FUTURES = 0
for _name in __future__.all_feature_names:
    _FUTURES |= getattr(__future__, _name).compiler_flag

Seen = frozenset[Any]


# ---------------------------------------------------------------------------------- the source


def source(function: Any) -> ast.FunctionDef:
    """The definition of a function, of which it is certain that it is what runs.

    Raises:
        Refused: where there is none, or it is no plain function.
    """
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise Refused("is decorated")
    try:
        lines = textwrap.dedent(inspect.getsource(function))
        (tree,) = ast.parse(lines).body
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise Refused("has no source to read") from error
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise Refused("is decorated")
    if not tree.args.posonlyargs and not tree.args.args:
        raise Refused("takes no module")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await):
            raise Refused("is a generator")
        name = getattr(node, "id", getattr(node, "attr", ""))
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            raise Refused(f"has a private name, `{name}`")
        if name in ("locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe"):
            raise Refused(f"asks for `{name}`")
    if _gist(_code(tree, function)) != _gist(function.__code__):
        raise Refused("is not what its source says")
    return tree


def _code(tree: ast.FunctionDef, function: types.FunctionType) -> types.CodeType:
    """A definition, compiled where the function was: with its free names, and one more, ours."""
    tree = copy.deepcopy(tree)
    tree.returns = None
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    count = len(tree.args.defaults)
    tree.args.defaults = [ast.Constant(None) for _ in range(count)]
    tree.args.kw_defaults = [
        None if d is None else ast.Constant(None) for d in tree.args.kw_defaults
    ]
    outer = ast.parse("def _(): pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    names = (*function.__code__.co_freevars, _FUSE)
    outer.args.args = [ast.arg(name) for name in names]
    outer.body = [tree]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    compiled = compile(
        module, function.__code__.co_filename, "exec", function.__code__.co_flags & _FUTURES, True
    )
    (holder,) = (c for c in compiled.co_consts if isinstance(c, types.CodeType))
    (code,) = (
        c for c in holder.co_consts if isinstance(c, types.CodeType) and c.co_name == tree.name
    )
    return code


_CELL = types.CellType(fuse)


def _gist(code: types.CodeType) -> list[tuple[str, Any]]:
    """What a code does; not how it calls, which depends on what the whole file imports."""
    names = {*dis.hasname, *dis.haslocal, *dis.hasfree, *dis.hasconst, *dis.hascompare}
    return [
        (
            i.opname.replace("LOAD_METHOD", "LOAD_ATTR"),
            i.argval if i.opcode in names and not isinstance(i.argval, types.CodeType) else None,
        )
        for i in dis.get_instructions(code)
        if i.opname not in ("PUSH_NULL", "PRECALL", "EXTENDED_ARG", "CALL_METHOD", "CALL_FUNCTION")
    ]


def _function(tree: ast.FunctionDef, original: types.FunctionType) -> types.FunctionType:
    """What ``tree`` defines, in the place of the original: its globals, closure and defaults."""
    code = _code(tree, original)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells[_FUSE] = _CELL
    made = types.FunctionType(
        code.replace(co_qualname=original.__qualname__) if hasattr(code, "co_qualname") else code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    made.__kwdefaults__ = original.__kwdefaults__
    return made


# ---------------------------------------------------------------------------------- the editing


class Reader:
    """What an :class:`Editor` knows of callees and branches: by default what it was told."""

    def __init__(self, function: Any, roles: dict[str, str] | None = None) -> None:
        #: Functions of Python's own that look at something, and do nothing.
        self.looking = {name for name in _LOOKING if name not in function.__globals__}
        #: By its text, what a callee does: "opens" (its call may be pending), "passes" (what it is
        #: given), "activates".
        self.roles = {} if roles is None else roles
        #: In how many branches what is read now stands that are not taken.
        self.untaken = 0

    def role(self, callee: ast.expr) -> str | None:
        return self.roles.get(ast.unparse(callee))

    def opened(self, callee: ast.expr) -> Seen:
        """The layers whose call may be pending after this one."""
        return frozenset()

    def added(self, layers: Seen, other: ast.expr) -> Seen:
        return layers

    def consumed(self, layers: Seen, by: ast.Call | None, role: str | None) -> None:
        """A call takes what they computed, or something that fuses nothing (``None``).

        ``"waits"``: nothing does, but it is computed now, for what may be added to it later.
        """

    def takes(self, test: ast.expr) -> bool | None:
        """Whether a branch is taken, where that is known."""
        return None


class _NotUnderstood(Exception):
    """The pending calls must be made before this statement."""


_SIMPLE = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.UnaryOp, ast.Tuple, ast.operator,
           ast.unaryop, ast.expr_context, ast.BinOp, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop,
           ast.keyword, ast.Slice)  # fmt: skip
_NESTED = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ListComp,
           ast.SetComp, ast.DictComp, ast.GeneratorExp)  # fmt: skip
_LOOKING = ("getattr", "hasattr", "isinstance", "len")
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def _is_plain(node: ast.AST) -> bool:
    return all(isinstance(n, _SIMPLE) for n in ast.walk(node))


def _loads(node: ast.AST) -> Counter[str]:
    return Counter(
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)
    )


def _use(function: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.expr:
    name = ast.Attribute(ast.Name(_FUSE, ast.Load()), function, ast.Load())
    return ast.Call(name, list(arguments), list(keywords))


def _load(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


class Editor:
    """Edits one function. Expressions come back with the layers whose call they may leave pending,
    ``None`` where they leave none."""

    def __init__(self, tree: ast.FunctionDef, reader: Reader) -> None:
        self.reader = reader
        #: The names that hold a pending call at this point, oldest first, and what is known of it.
        self.held: dict[str, Seen] = {}
        self.returned: Seen | None = None
        #: What is being edited, and how often it reads each name.
        self.statement: ast.stmt = tree
        self.reads: Counter[str] = Counter()
        #: How many ``with`` and how many loops it stands in.
        self.within = 0
        self.loops = 0
        self.temporaries = 0
        nodes = list(ast.walk(tree))
        #: Where each name is read.
        self.loads: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for node in nodes:
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
                self.loads[node.id].append((node.lineno, node.col_offset))
        arguments = tree.args
        #: The names that are surely bound at this point.
        self.bound = {
            a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        }
        self.barred = {n.id for nested in nodes[1:] if isinstance(nested, _NESTED)
                       for n in ast.walk(nested) if isinstance(n, ast.Name)}  # fmt: skip
        for node in nodes:
            if isinstance(node, ast.Global | ast.Nonlocal):
                self.barred.update(node.names)
            elif isinstance(node, ast.NamedExpr):
                self.barred.add(node.target.id)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del):
                self.barred.add(node.id)
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.looking = reader.looking - stored - self.bound
        self.tree = copy.deepcopy(tree)
        self.tree.body = self._block(self.tree.body)

    # Statements

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """A function's or a loop's body: what is pending at its end is made there."""
        written = self._run(statements)
        if not (statements and isinstance(statements[-1], _ENDS)):
            written += self._made()
        return written

    def _run(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        written: list[ast.stmt] = []
        for statement in statements:
            before, returned = dict(self.held), self.returned
            self.statement, self.reads = statement, _loads(statement)
            original = copy.deepcopy(statement)
            try:
                edited = self._edited(statement)
            except _NotUnderstood:
                self.held, self.returned = before, returned
                written += self._made()
                self.statement, self.reads = original, _loads(original)
                edited = self._edited(original)
            written += edited
        return written

    def _made(self) -> list[ast.stmt]:
        """Statements that make what is pending."""
        for layers in self.held.values():
            self.reader.consumed(layers, None, None)
        made: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], _use("value", _load(name)))
            for name in self.held
        ]
        self.held = {}
        line = self.statement
        return [ast.copy_location(statement, line) for statement in made]

    def _require_nothing_held(self) -> None:
        if self.held:
            raise _NotUnderstood

    def _edited(self, s: ast.stmt) -> list[ast.stmt]:
        if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name):
            return self._assigned(s, s.targets[0].id, s.value)
        if isinstance(s, ast.AnnAssign) and s.value is not None and isinstance(s.target, ast.Name):
            return self._assigned(s, s.target.id, s.value)
        if isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            return self._augmented(s, s.target.id)
        if isinstance(s, ast.Return):
            if s.value is not None:
                s.value, layers = self._expression(s.value)
                if layers is not None and self.within:
                    s.value = self._value(s.value, layers)
                elif layers is not None:
                    self.returned = (self.returned or frozenset()) | layers
            self._require_nothing_held()
            return [s]
        if isinstance(s, ast.Pass):
            return [s]
        if isinstance(s, ast.If):
            return self._branched(s)
        if isinstance(s, ast.Expr):
            s.value = self._plainly(s.value)
            return [s]
        self._require_nothing_held()
        if isinstance(s, ast.For | ast.While):
            self.loops += 1
            s.body = self._block(s.body)
            self.loops -= 1
            s.orelse = self._block(s.orelse)
        elif isinstance(s, ast.With):
            self.within += 1
            s.body = self._block(s.body)
            self.within -= 1
        elif isinstance(s, ast.Assign):
            s.value = self._plainly(s.value)
        return [s]

    def _assigned(self, s: Any, name: str, value: ast.expr) -> list[ast.stmt]:
        s.value, layers = self._expression(value)
        if name in self.held:  # what was pending is overwritten before anybody has asked for it
            raise _NotUnderstood
        if layers is not None:
            if self.within or name in self.barred:
                s.value = self._value(s.value, layers)
            else:
                self.held[name] = layers
        self.bound.add(name)
        return [s]

    def _augmented(self, s: ast.AugAssign, name: str) -> list[ast.stmt]:
        if name not in self.held:
            s.value = self._plainly(s.value)
            return [s]
        if not isinstance(s.op, ast.Add) or self.reads[name]:
            raise _NotUnderstood
        value, layers = self._expression(s.value)
        mine = self.held.pop(name)
        self.held[name] = self.reader.added(mine | (layers or frozenset()), value)
        edited = ast.Assign([ast.Name(name, ast.Store())], _use("add_in_place", _load(name), value))
        return [ast.copy_location(edited, s)]

    def _branched(self, s: ast.If) -> list[ast.stmt]:
        plain = all(
            isinstance(n, _SIMPLE)
            or (isinstance(n, ast.Call) and getattr(n.func, "id", None) in self.looking)
            for n in ast.walk(s.test)
        )
        if self.held and (not plain or _loads(s.test).keys() & self.held.keys()):
            raise _NotUnderstood
        taken = self.reader.takes(s.test)
        if not self.held:
            s.test = self._plainly(s.test)
        held, bound = self.held, self.bound
        bodies: list[list[ast.stmt]] = []
        outcomes: list[tuple[list[ast.stmt], dict[str, Seen], set[str]]] = []
        for branch, runs in ((s.body, True), (s.orelse, False)):
            self.held, self.bound = dict(held), set(bound)
            untaken = taken is not None and taken is not runs
            self.reader.untaken += untaken
            bodies.append(self._run(branch))
            self.reader.untaken -= untaken
            if untaken:
                self.held = dict.fromkeys(self.held, frozenset())
            if not (branch and isinstance(branch[-1], _ENDS)):
                outcomes.append((bodies[-1], self.held, self.bound))
        self.bound = set.intersection(*(names for *_, names in outcomes)) if outcomes else bound
        joined: dict[str, Seen] = {}
        for body, left, _ in outcomes:
            # A name that is bound in one branch alone may not be asked for behind them.
            self.held = {n: layers for n, layers in left.items() if n not in self.bound}
            body += self._made()
            for name in left:
                if name in self.bound:
                    joined[name] = joined.get(name, frozenset()) | left[name]
        self.held = joined
        s.body, s.orelse = bodies
        return [s]

    # Expressions

    def _value(self, node: ast.expr, layers: Seen) -> ast.expr:
        self.reader.consumed(layers, None, None)
        return _use("value", node)

    def _plainly(self, node: ast.expr) -> ast.expr:
        """The same, with nothing pending in its result."""
        edited, layers = self._expression(node)
        return edited if layers is None else self._value(edited, layers)

    def _dies(self, name: str) -> bool:
        """Whether the value that a name has is read in this statement for the last time."""
        s = self.statement
        if self.reads[name] != 1:
            return False
        targets = s.targets if isinstance(s, ast.Assign) else [getattr(s, "target", None)]
        overwrites = len(targets) == 1 and getattr(targets[0], "id", None) == name
        if overwrites or isinstance(s, ast.Return):
            return True
        if self.loops:
            return len(self.loads[name]) == 1
        return max(self.loads[name]) < (s.end_lineno or 0, s.end_col_offset or 0)

    def _expression(self, node: ast.expr) -> tuple[ast.expr, Seen | None]:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self.held:
            if not self._dies(node.id):
                raise _NotUnderstood
            return node, self.held.pop(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._sum(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        partly = isinstance(node, ast.IfExp | ast.BoolOp | ast.Compare)
        if partly and _loads(node).keys() & self.held.keys():
            raise _NotUnderstood  # what is pending may not end in a part that is not evaluated
        if isinstance(node, ast.IfExp):
            return self._choice(node)
        if isinstance(node, (*_NESTED, ast.NamedExpr)):
            self._require_nothing_held()
            return node, None
        for name, field in ast.iter_fields(node):
            if isinstance(field, ast.expr):
                setattr(node, name, self._plainly(field))
            elif isinstance(field, list):
                field[:] = [self._plainly(n) if isinstance(n, ast.expr) else n for n in field]
        return node, None

    def _choice(self, node: ast.IfExp) -> tuple[ast.expr, Seen | None]:
        taken = self.reader.takes(node.test)
        node.test = self._plainly(node.test)
        found: Seen | None = None
        for name, runs in (("body", True), ("orelse", False)):
            untaken = taken is not None and taken is not runs
            self.reader.untaken += untaken
            edited, layers = self._expression(getattr(node, name))
            self.reader.untaken -= untaken
            setattr(node, name, edited)
            if layers is not None:
                found = (found or frozenset()) | layers
        return node, found

    def _sum(self, node: ast.BinOp) -> tuple[ast.expr, Seen | None]:
        left, first = self._expression(node.left)
        if first is None:
            right, second = self._expression(node.right)
        else:
            # What stands on the left is pending while the right is evaluated.
            if isinstance(left, ast.Name):
                held = left.id
            else:
                held = f"_triton_bn_{self.temporaries}"
                self.temporaries += 1
                if not _is_plain(node.right):
                    left = ast.NamedExpr(ast.Name(held, ast.Store()), left)
            self.held[held] = first
            right, second = self._expression(node.right)
            first = self.held.pop(held)
        if first is None and second is None:
            node.left, node.right = left, right
            return node, None
        layers = (first or frozenset()) | (second or frozenset())
        other = right if second is None else left
        return ast.copy_location(_use("add", left, right), node), self.reader.added(layers, other)

    def _call(self, node: ast.Call) -> tuple[ast.expr, Seen | None]:
        callee = node.func
        if isinstance(callee, ast.Attribute) and not node.args and not node.keywords:
            owner, layers = self._expression(callee.value)
            if layers is not None:
                if callee.attr in fuse.METHODS:
                    self.reader.consumed(layers, node, "activates")
                    edited = _use("method", owner, ast.Constant(callee.attr))
                    return ast.copy_location(edited, node), None
                owner = self._value(owner, layers)
            callee.value = owner
            node.func = self._after(callee, None)
            return node, None
        if not _is_plain(callee) or _loads(callee).keys() & self.held.keys():
            self._require_nothing_held()
            node.func = self._plainly(callee)
        role = self.reader.role(callee) if _is_plain(callee) else None
        rest = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
        names = all(keyword.arg is not None for keyword in node.keywords)
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        if not node.args or starred or not names or not all(map(_is_plain, rest)):
            role = None
        first, layers = self._expression(node.args[0]) if node.args else (None, None)
        if layers is not None and role != "passes":
            self.reader.consumed(layers, node, role)
        others = [self._plainly(argument) for argument in node.args[1:]]
        for keyword in node.keywords:
            keyword.value = self._plainly(keyword.value)
        node.func = self._after(node.func, role)
        if first is not None:
            node.args = [first, *others]
        if role == "opens" or (role is not None and layers is not None):
            edited = _use("call", node.func, *node.args, keywords=node.keywords)
            if role == "activates":
                return ast.copy_location(_use("value", edited), node), None
            return edited, layers if role == "passes" else self.reader.opened(callee)
        if layers is not None:
            node.args[0] = _use("value", node.args[0])
        return node, None

    def _after(self, callee: ast.expr, role: str | None) -> ast.expr:
        """The callee, which is called when what is pending has been made."""
        if not self.held or (isinstance(callee, ast.Name) and callee.id in self.looking):
            return callee
        edited = _use("after", callee, *map(_load, self.held))
        if role != "passes" and not self.reader.untaken:
            for name, layers in self.held.items():
                self.reader.consumed(layers, None, "waits")
                self.held[name] = frozenset()
        return ast.copy_location(edited, callee)


# ------------------------------------------------------------------------------- the new class


@cache
def rewritten(cls: type, methods: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]) -> type:
    """A subclass of ``cls`` whose methods are edited, each by the roles of the callees in it.

    Raises:
        Refused: where a source cannot be read, or the class not be derived from.
    """
    body: dict[str, Callable[..., Any]] = {}
    for name, roles in methods:
        function = inspect.getattr_static(cls, name)
        edited = Editor(source(function), Reader(function, dict(roles))).tree
        body[name] = fuse.fusing(cls, name, _function(edited, function))
    return derived((cls,), body, (rewritten, cls, methods))
