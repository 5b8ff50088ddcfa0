"""Every public name and method has an example, and it runs."""

import ast
import doctest
import inspect
from pathlib import Path

import pytest
import torch

import mi_kernels as mi

TYPES = {"ActivationName", "BackendName", "RecurrentName"}  # literals


def public() -> dict[str, object]:
    names = {f"mi.{name}": getattr(mi, name) for name in mi.__all__ if not name.startswith("_")}
    names |= {f"mi.nn.{name}": getattr(mi.nn, name) for name in mi.nn.__all__}
    names |= {f"mi.nn.rules.{name}": getattr(mi.nn.rules, name) for name in mi.nn.rules.__all__}
    names |= {f"mi.parallel.{name}": getattr(mi.parallel, name) for name in mi.parallel.__all__}
    return {
        name: value
        for name, value in names.items()
        if not inspect.ismodule(value) and name.removeprefix("mi.") not in TYPES
    }


def methods() -> dict[str, object]:
    """The public methods and properties of public classes, where this package writes them."""
    found = {}
    for value in public().values():
        for cls in inspect.getmro(value) if inspect.isclass(value) else ():
            for attribute, member in vars(cls).items() if cls.__module__.startswith("mi_kernels.") else ():
                function = inspect.unwrap(
                    getattr(member, "fget", None) or getattr(member, "__func__", member)
                )
                if (
                    inspect.isfunction(function)
                    and not attribute.startswith("_")
                    and attribute != "extra_repr"
                ):
                    found.setdefault(f"{cls.__qualname__}.{attribute}", function)
    return found


DOCUMENTED = public() | methods()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_example(name, recwarn):
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    found = doctest.DocTestParser().get_doctest(text, {"mi": mi, "torch": torch}, name, None, None)
    assert found.examples, f"{name}: no example in its docstring"
    report: list[str] = []
    results = doctest.DocTestRunner().run(found, out=report.append)
    assert results.failed == 0, "".join(report)
    deprecated = [str(one.message) for one in recwarn if one.category is FutureWarning]
    assert deprecated == []


def test_every_forward_of_a_module_has_a_docstring():
    missing = []
    for path in sorted((Path(mi.__file__).parent).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for one in node.body:  # of an autograd Function it is static
                if isinstance(one, ast.FunctionDef) and one.name == "forward" and not one.decorator_list:
                    missing += [] if ast.get_docstring(one) else [f"{path.name}: {node.name}"]
    assert not missing


@pytest.mark.parametrize("name", public())
def test_a_docstring_says_what_is_raised_and_returned(name):
    text, value = inspect.getdoc(public()[name]), public()[name]
    if inspect.isfunction(value) and value is not mi.explain:
        parts = ["Returns:", "Raises:", *(["Args:"] if inspect.signature(value).parameters else [])]
        assert all(part in text for part in parts) or value in (mi.backend, mi.nn.rules.dit), name
