"""The table of contents of the package."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pkgutil import walk_packages

import pytest

import tlmc


@pytest.mark.parametrize("name", tlmc.__all__)
def test_every_name_is_there_and_documented(name):
    thing = getattr(tlmc, name)
    assert name in dir(tlmc)
    assert not callable(thing) or thing.__doc__


@pytest.mark.parametrize("module", [found.name for found in walk_packages(tlmc.__path__, "tlmc.") if found.ispkg])
def test_names_of_the_subpackages_are_there(module):
    content = importlib.import_module(module)
    assert all(hasattr(content, name) for name in getattr(content, "__all__", ()))


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tlmc' has no attribute 'fine_tune'"):
        _ = tlmc.fine_tune


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "5000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_import_is_cheap_and_sets_only_what_the_user_has_not(given, expected):
    code = "import os, sys, tlmc; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", expected]
