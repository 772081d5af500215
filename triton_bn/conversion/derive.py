"""Classes made for one module: subclasses of its class, of the same name, that copy and pickle.

A module gets another behaviour by getting another class, as PyTorch does for lazy layers and
parametrizations. Unlike a function put on the instance it stays right when the module is copied,
replicated, traced or compiled, and it leaves the module what it was: ``isinstance``, attributes,
methods, ``state_dict``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["Refused", "derived", "is_derived", "merged", "original", "recipe", "underneath"]

_RECIPE = "_triton_bn_recipe"


class Refused(Exception):
    """Why something of a model is left as it is. The text completes "its forward ..."."""


@cache
def merged(cls: type, *fronts: type) -> type:
    """A subclass of ``cls`` where the methods of ``fronts`` come first.

    Raises:
        Refused: where ``cls`` cannot be subclassed so that its objects still copy and pickle.
    """
    return derived((*fronts, cls), {}, (merged, cls, *fronts))


def derived(bases: tuple[type, ...], body: dict[str, Any], recipe: tuple[Any, ...]) -> type:
    """The class that ``recipe`` makes: a function, the class it starts from, what else it is given.

    Objects are pickled with the recipe, by which :func:`_make` finds the class again.

    Raises:
        Refused: where the last of ``bases`` cannot be subclassed so.
    """
    cls = bases[-1]
    pickling = ("__reduce__", "__reduce_ex__")
    own = any(getattr(cls, name) is not getattr(object, name) for name in pickling)
    if own and not is_derived(cls):
        raise Refused("belongs to a class that pickles in a way of its own")

    def reduce(self: Any, protocol: Any) -> Any:
        """As any object's, but for the class: no import finds it, so it is made again."""
        reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        _, (_, *arguments), *state = reduced
        return _make, (_written(recipe), *arguments), *state

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    try:
        body = {**names, **body, "__reduce_ex__": reduce, _RECIPE: recipe}
        return type(cls)(cls.__name__, bases, body)
    except TypeError as error:
        raise Refused(f"belongs to a class that cannot be subclassed: {error}") from error


class _Recipe(tuple[Any, ...]):
    """Stands for the class that it makes, in another's recipe."""


def _written(recipe: tuple[Any, ...]) -> tuple[Any, ...]:
    """The recipe, without classes that no import finds."""
    maker, cls, *others = recipe
    return maker, _Recipe(_written(vars(cls)[_RECIPE])) if is_derived(cls) else cls, *others


def _made(recipe: tuple[Any, ...]) -> Any:
    maker, cls, *others = recipe
    cls = _made(cls) if isinstance(cls, _Recipe) else cls
    try:
        return maker(cls, *others)
    except Refused:  # the code is another by now, and cannot be edited: it runs as it is
        return cls


def _make(recipe: tuple[Any, ...], *arguments: Any) -> Any:
    cls = _made(recipe)
    return cls.__new__(cls, *arguments)


def is_derived(cls: type) -> bool:
    """Whether the class was made here."""
    return _RECIPE in vars(cls)


def recipe(cls: type) -> tuple[Any, ...] | None:
    """How a class made here is made again; ``None`` for any other."""
    return vars(cls).get(_RECIPE)


def original(cls: type) -> type:
    """The class that one made here started from; any other itself."""
    start: type = vars(cls)[_RECIPE][1] if is_derived(cls) else cls
    return start


def underneath(cls: type, front: type | None = None) -> type:
    """``cls`` with every class made here, below another's too, taken back; or those with ``front`` alone.

    FSDP2 and parametrizations put a class of theirs over a module's: that one is made again.
    """

    def meant(each: type) -> bool:
        return is_derived(each) and (front is None or front in each.__bases__)

    if meant(cls):
        return underneath(original(cls), front)
    if not any(map(meant, cls.__mro__)):
        return cls
    bases = tuple(underneath(base, front) for base in cls.__bases__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)
