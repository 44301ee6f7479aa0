"""The examples in docstrings."""

import doctest
import pkgutil
from importlib import import_module

import dit_qat


def test_examples_in_docstrings() -> None:
    names = [m.name for m in pkgutil.walk_packages(dit_qat.__path__, "dit_qat.")]
    results = [doctest.testmod(import_module(name)) for name in names]
    assert sum(result.attempted for result in results) >= 8
    assert sum(result.failed for result in results) == 0
