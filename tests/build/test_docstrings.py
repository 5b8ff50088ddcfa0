"""Every public name has an example, and it runs."""

import doctest
import inspect

import pytest
import torch

import mi_kernels as mi

TYPES = {"ActivationName", "BackendName", "RecurrentName"}  # literals


def public() -> dict[str, object]:
    names = {f"mi.{name}": getattr(mi, name) for name in mi.__all__ if not name.startswith("_")}
    names |= {f"mi.nn.{name}": getattr(mi.nn, name) for name in mi.nn.__all__}
    return {
        name: value
        for name, value in names.items()
        if not inspect.ismodule(value) and name.removeprefix("mi.") not in TYPES
    }


@pytest.mark.parametrize("name", public())
def test_example(name):
    value = public()[name]
    found = doctest.DocTestParser().get_doctest(
        inspect.getdoc(value), {"mi": mi, "torch": torch}, name, None, None
    )
    assert found.examples, f"{name}: no example in its docstring"
    report: list[str] = []
    results = doctest.DocTestRunner().run(found, out=report.append)
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize("name", public())
def test_a_docstring_says_what_is_raised_and_returned(name):
    text, value = inspect.getdoc(public()[name]), public()[name]
    if inspect.isfunction(value) and value is not mi.explain:
        parts = ["Returns:", "Raises:", *(["Args:"] if inspect.signature(value).parameters else [])]
        assert all(part in text for part in parts) or value is mi.backend, name
