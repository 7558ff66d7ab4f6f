"""Descriptors of atomic environments."""

from __future__ import annotations
