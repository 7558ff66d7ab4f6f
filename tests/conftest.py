"""Set-up shared by all tests: own reports and caches, and mirror tests say why they skip."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest

from tlmc.paths import cache_dir
from tlmc.potentials import Potential, load_start_model

CACHES_OF_TOOLS = ("fontconfig", "matplotlib", "pip")
MIRRORS = ("TLMC_DATA_DIR", "TORCHANI_DATA_DIR")


def _missing_mirrors() -> list[str]:
    given = {name: os.environ.get(name) for name in MIRRORS}
    return [name for name, folder in given.items() if not (folder and Path(folder).is_dir())]


def _mirror_is_required() -> bool:
    return os.environ.get("TLMC_REQUIRE_MIRROR", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Give all workers of a run one cache folder, and what tests start the path to ``helpers``.

    The user's own cache is neither written nor used; weights in it, fetched once per machine, are copied (their hashes
    are checked where they are read).
    """
    if hasattr(config, "workerinput"):
        return  # a worker inherits the environment
    folder = tempfile.TemporaryDirectory(prefix="tlmc-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    cache, general = Path(folder.name, "cache"), Path(folder.name, "general")
    if (weights := cache_dir() / "start-models").is_dir():
        shutil.copytree(weights, cache / "start-models")
    general.mkdir()
    for name in CACHES_OF_TOOLS:
        if (own := Path(platformdirs.user_cache_dir(name))).is_dir():
            (general / name).symlink_to(own)
    patch.setenv("TLMC_CACHE_DIR", str(cache))
    # the folder of tlmc.paths.user_cache_dir lies in it
    patch.setenv("XDG_CACHE_HOME", str(general))
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.fixture(autouse=True, scope="session")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Send reports to a temporary folder and draw without a screen; processes started by tests inherit both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLMC_REPORTS_DIR", str(tmp_path_factory.mktemp("reports")))
        patch.setenv("MPLBACKEND", "Agg")
        yield


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Undo what a command does to the loggers, which would print more in later tests, and to closed streams."""
    loggers = [logging.getLogger(name) for name in ("tlmc", "papermill")]
    before = [(logger.level, [*logger.handlers]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(scope="session")
def ani2x() -> Potential:
    """The start model of the thesis; tests that take it are marked ``needs_mirror``."""
    return load_start_model("ani2x")


@pytest.fixture(scope="session")
def ani2xt() -> Potential:
    """The start model that the package index distributes; fetched once per machine."""
    return load_start_model("ani2xt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``needs_mirror`` where a mirror is absent, and name the variable."""
    missing = _missing_mirrors()
    if not missing:
        return
    skip = pytest.mark.skip(reason=f"needs the folders named by {' and '.join(missing)}")
    for item in items:
        if item.get_closest_marker("needs_mirror"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turn a skipped mirror test into a failure under ``TLMC_REQUIRE_MIRROR=1`` (the CI sets it)."""
    report = yield
    if report.skipped and item.get_closest_marker("needs_mirror") and _mirror_is_required():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and TLMC_REQUIRE_MIRROR is set: {report.longrepr[2]}"
    return report
