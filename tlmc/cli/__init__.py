"""The command line ``tlmc``."""

from __future__ import annotations

from tlmc.cli.main import app

__all__ = ["app"]
