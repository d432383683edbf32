"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import twn_kernels

# Kernels have no examples, and importing them would need Triton.
NAMES = [
    module.name
    for module in pkgutil.walk_packages(twn_kernels.__path__, "twn_kernels.")
    if not module.name.startswith(("twn_kernels.impl.triton", "twn_kernels.__main__", "twn_kernels._C"))
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_the_public_operations_have_examples():
    finder = doctest.DocTestFinder()
    for path in ("ops.dual_lora_linear", "ops.gate_scores", "modules.gate_mlp", "patching.scope"):
        module = importlib.import_module(f"twn_kernels.{path}")
        assert any(test.examples for test in finder.find(module)), path
