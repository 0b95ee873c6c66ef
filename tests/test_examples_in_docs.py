"""README's example runs and gives what it says; every public name is documented. (Examples in
docstrings are collected by pytest itself.)"""

import doctest
from pathlib import Path

import fused_rnn


def test_public_names_are_documented():
    for name in fused_rnn.__all__:
        assert getattr(fused_rnn, name).__doc__, name


def test_readme():
    readme = Path(__file__).parents[1] / "README.md"
    results = doctest.testfile(str(readme), module_relative=False)
    assert results.attempted > 0 and results.failed == 0
