"""Arguments of a wrong type get one sentence, as wrong values do, in the functions that users call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

from tlmc.errors import ConfigError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_SHOWN = (str, int, float, list, tuple, dict, type(None))
_NUMBERS: dict[Any, tuple[type, ...]] = {int: (Integral,), float: (Real,), bool: (bool, np.bool_)}


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function refuse arguments that are not what its annotations say.

    Only as far as the annotation is a class, a number, a text, a sequence or mapping of those, or a choice of them;
    the items of a list, tuple or array are looked at where they are texts or of a class. On ``__init__``, the sentence
    names the class.

    Raises
    ------
    ConfigError
        When the function is called with such an argument; the sentence names function, argument and value.
    """
    signature, empty = inspect.signature(function), inspect.Parameter.empty
    named = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.cache
    def hints() -> dict[str, Any]:
        found = {}
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.annotation is empty:
                continue
            try:
                found[name] = eval(str(parameter.annotation), getattr(inspect.unwrap(function), "__globals__", {}))
            except NameError:  # imported for type checkers only
                continue
        return found

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says what is missing
        for name, hint in hints().items():
            if name in given and not _fits(given[name], hint):
                value = given[name]
                shown = f"{value!r:.80}" if isinstance(value, _SHOWN) else f"an object of type {type(value).__name__}"
                wanted = signature.parameters[name].annotation
                raise ConfigError(f"{named}: {name} must be of type {wanted}, got {shown}")
        return function(*args, **kwargs)

    return call


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and (hint is bool or not isinstance(value, bool))
    kind = origin or hint
    if kind in (Sequence, Iterable):
        wanted = ("__len__", "__getitem__") if kind is Sequence else ("__iter__",)
        listed = all(hasattr(value, name) for name in wanted) and not _is_one_thing(value)
        # others may have to read each item from a file
        looked_at = value if isinstance(value, list | tuple | np.ndarray) else ()
        classes = [one for one in inner if inspect.isclass(one) and one not in _NUMBERS]
        return listed and all(isinstance(item, one) for one in classes for item in looked_at)
    if kind in (tuple, list):
        return hasattr(value, "__len__") and not _is_one_thing(value)
    return not inspect.isclass(kind) or kind is np.ndarray or isinstance(value, kind)


def _is_one_thing(value: Any) -> bool:
    """Tell whether something that has items is no sequence of them."""
    from ase import Atoms  # for which the help of the command line need not wait

    return isinstance(value, str | bytes | Mapping | Atoms)
