"""New elements that borrow what a model has learned of others (thesis 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from tlmc.arguments import checked
from tlmc.errors import ConfigError

Borrowing = Literal["relabel", "extend"]
"""Treat a new element as its donor, or give it a copy of what the donor has, which learns by itself."""

THESIS_DONORS: Final[Mapping[str, str]] = MappingProxyType({"Si": "C", "I": "Cl", "Cu": "S"})
"""The elements that the thesis adds to ANI-2x, each with the element whose network and channels it borrows."""


@checked
def parse_element_map(text: str) -> dict[str, str]:
    """Read new elements and their donors from one line of text; an empty line maps nothing.

    Raises
    ------
    ConfigError
        If a part is not ``NEW=DONOR``, or an element is named twice.

    Examples
    --------
    >>> parse_element_map("Si=C, I=Cl")
    {'Si': 'C', 'I': 'Cl'}
    """
    mapping: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        new, separator, donor = (side.strip() for side in part.partition("="))
        if not (separator and new and donor) or new in mapping:
            raise ConfigError(f"an element map reads 'Si=C, I=Cl', each new element once; got {part!r} in {text!r}")
        mapping[new] = donor
    return mapping
