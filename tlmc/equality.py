"""Equality of records that hold arrays, tensors or tables: by content, without an error.

What :mod:`dataclasses` and :class:`typing.NamedTuple` generate compares fields with ``==``, which has no single truth
value for an array, and hashes fields, which arrays refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def equal_by_content(cls: type[T]) -> type[T]:
    """Let records of a dataclass or NamedTuple be equal if all that they hold is, and be hashable.

    Arrays are equal with one type, shape and content, NaN being equal to NaN; tensors wherever they lie. A hash looks
    at no number of an array, since arrays can be changed in place, so that it stays what it was in a dictionary.
    """
    for name, method in (("__eq__", _equal), ("__ne__", _unequal), ("__hash__", _hash)):
        setattr(cls, name, method)
    return cls


def equal_if_identical(cls: type[T]) -> type[T]:
    """Let a record be equal to itself only: a workspace, whose content is not all meant."""
    for name in ("__eq__", "__ne__", "__hash__"):
        setattr(cls, name, getattr(object, name))
    return cls


def same(a: Any, b: Any) -> bool:
    """Tell whether two values have one content, whatever they are made of."""
    if a is b:
        return True
    if type(a) is not type(b):
        plain = isinstance(a, int | float | str) and isinstance(b, int | float | str)
        return plain and bool(a == b or (a != a and b != b))
    if _is_tensor(a):
        import torch  # here already; what never sees a tensor need not wait for it

        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        a, b = a.detach().cpu(), b.detach().cpu()
        return torch.equal(a, b) or bool(torch.isclose(a, b, rtol=0.0, atol=0.0, equal_nan=True).all())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if hasattr(a, "equals"):  # tables of pandas, whose == is one value per cell
        return bool(a.equals(b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "dtype")


def _equal(self: Any, other: object) -> Any:
    if type(self) is type(other):
        return same(self, other)
    # a plain tuple would compare arrays its own way
    return False if isinstance(other, tuple) else NotImplemented


def _unequal(self: Any, other: object) -> Any:
    equal = _equal(self, other)
    return equal if equal is NotImplemented else not equal


def _hash(self: Any) -> int:
    names = [f.name for f in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else self._fields
    return hash((type(self).__qualname__, *(_key(getattr(self, name)) for name in names)))


def _key(value: Any) -> Any:
    """Return what a hash may use: nothing that can be changed in place."""
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    if isinstance(value, int | float | str | None) and value == value:
        return value
    return type(value).__qualname__
