"""How nbval compares the notebooks, and where they write while it runs them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from nbval.plugin import IPyNbFile

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Send the notebooks' results to a copy of the tracked metrics, so that a test changes no tracked report."""
    reports = tempfile.mkdtemp(prefix="tlmc-nbval-")
    config.add_cleanup(lambda: shutil.rmtree(reports))
    if (ROOT / "reports" / "metrics").is_dir():
        shutil.copytree(ROOT / "reports" / "metrics", Path(reports, "metrics"))
    os.environ["TLMC_REPORTS_DIR"] = reports
    # figures are outputs: the inline backend, whatever the shell says
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["IPYTHONDIR"] = str(Path(reports, "ipython"))


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave warnings and drawings out of the comparison: they differ between machines."""
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("stderr", "image/svg+xml")
