"""``python -m tlmc.cli``."""

from tlmc.cli import app

if __name__ == "__main__":
    app()
