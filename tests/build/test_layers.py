"""Imports go one way: the table of layers in CONTRIBUTING.md, read from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mi_kernels"


def layers() -> list[list[str]]:
    """The modules of each layer, from the top: the first column of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [re.findall(r"`([\w./]+)`", row) for row in rows]


def layer_of(module: str) -> int:
    """The layer of the longest entry that names a module, or a package around it."""
    found = {
        entry: index
        for index, entries in enumerate(layers())
        for entry in (one.removesuffix(".py").replace("/", ".") for one in entries)
        if module == entry or (module.startswith(entry + ".") and entry != PACKAGE)
    }
    assert found, f"CONTRIBUTING.md: {module} is in no layer"
    return found[max(found, key=len)]


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append((name, path))
    return found


def imported(node: ast.AST, path: Path, known: set[str]) -> list[str]:
    """Modules of the package that a statement imports: relatively, as the package works under any name."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        assert not names, f"{path}, line {node.lineno}: expected a relative import, got {names[0]}"
    if isinstance(node, ast.ImportFrom):
        assert node.level or (node.module or "").split(".")[0] != PACKAGE, (
            f"{path}, line {node.lineno}: expected a relative import, got {node.module}"
        )
        if node.level:
            package = path.relative_to(ROOT).parts[: -node.level]
            module = ".".join([*package, *([node.module] if node.module else [])])
            inside = (f"{module}.{alias.name}" for alias in node.names)
            return [name if name in known else module for name in inside]
    return []


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """Wherever in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from imported(node, path, known)


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_go_down(module, path):
    known = {name for name, _ in modules()}
    up = [other for other in imports(path, known) if layer_of(other) < layer_of(module)]
    assert not up, f"{module} imports {', '.join(up)}, of a layer above"


def test_operations_know_nothing_above_them():
    """Stated again without the table, so that the table cannot be widened to hide it."""
    known = {name for name, _ in modules()}
    for module, path in modules():
        if module.startswith("mi_kernels.ops"):
            others = [other for other in imports(path, known) if not other.startswith("mi_kernels.ops")]
            assert not others, f"{module} imports {', '.join(others)}"


def test_families_know_few_of_each_other():
    """The dense interaction and modulation stand alone; gates are made of both, norms of modulation."""
    known = {name for name, _ in modules()}
    families = {"interaction": (), "modulate": (), "norm": ("modulate",), "gate": ("interaction", "modulate")}
    families["recurrent"] = ("interaction",)
    for family, allowed in families.items():
        for module, path in modules():
            if not module.startswith(f"mi_kernels.ops.{family}"):
                continue
            for other in imports(path, known):
                parts = other.split(".")
                if len(parts) > 3 or other in {f"mi_kernels.ops.{name}" for name in families}:
                    assert parts[2] in (family, *allowed), f"{module} imports {other}"


def test_no_module_imports_itself_by_a_detour():
    """No cycles, of the imports at the top of files."""
    known = {name for name, _ in modules()}
    graph = {}
    for module, path in modules():
        top = [name for node in ast.parse(path.read_text()).body for name in imported(node, path, known)]
        graph[module] = set(top) & known
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for other in graph[module]:
            if other != module:
                visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_modules_are_imported_by_name_in_few_places():
    """What the table does not see: the kernels of Triton, which are imported when they are first called."""
    found = {
        module
        for module, path in modules()
        if "import_module(" in path.read_text() or "__import__(" in path.read_text()
    }
    assert found <= {"mi_kernels.ops.library", "mi_kernels.testing.without_data", "mi_kernels.doctor"}
