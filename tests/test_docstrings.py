"""The examples in the docstrings run and say what they print."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import hf_compressm
from hf_compressm.criteria import CRITERIA

MODULES = [module.name for module in pkgutil.walk_packages(hf_compressm.__path__, "hf_compressm.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch):
    # One example registers a criterion: on a copy of the registry.
    monkeypatch.setattr("hf_compressm.criteria.CRITERIA", dict(CRITERIA))
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_public_functions_and_classes_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("CompreSSMConfig", "Compressor", "compress", "compress_", "find_mixers", "measure"):
        assert any(test.examples for test in finder.find(getattr(hf_compressm, name), name)), name
