"""The examples in docstrings and README run and give what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import fused_rnn

MODULES = [
    f"fused_rnn.{m.name}"
    for m in pkgutil.iter_modules(fused_rnn.__path__)
    if m.name not in ("_C", "__main__")
]


@pytest.mark.parametrize("name", ["fused_rnn", *MODULES])
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_names_are_documented():
    for name in fused_rnn.__all__:
        assert getattr(fused_rnn, name).__doc__, name


def test_readme():
    readme = Path(__file__).parents[1] / "README.md"
    results = doctest.testfile(str(readme), module_relative=False)
    assert results.attempted > 0 and results.failed == 0
