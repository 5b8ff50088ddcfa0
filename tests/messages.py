"""The messages that users may meet, read from the sources, and what docs/troubleshooting.md says of them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
# Not `testing`, whose errors are those of tests, nor the rules of other packages' layers: they catch what the
# readers of these packages' code raise.
SOURCES = [ROOT / "mi_kernels", ROOT / "setup.py"]
INNER = re.compile(r"mi_kernels/testing/|nn/rules/_(?!_init__)")
GAP = "…"  # what is known only when the message is made
# Functions whose texts become parts of messages, or lines of `doctor`.
REASONS = re.compile(r".*(_error|_library|why_not|distrust|wrong_device|unusable)$")


def messages() -> dict[str, str]:
    """Each message, with gaps, and where it is made."""
    found: dict[str, str] = {}
    for path in python_files():
        for line, text in in_python(path.read_text()):
            found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
            for line, text in in_cpp(path.read_text()):
                found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    return found


def python_files() -> list[Path]:
    paths = [path for source in SOURCES for path in (sorted(source.rglob("*.py")) or [source])]
    return [path for path in paths if path.is_file() and not INNER.search(path.as_posix())]


def in_python(text: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(text)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and REASONS.fullmatch(function.name):
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield from known(node.lineno, texts_of(node.value, tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (argument := argument_of(node)) is not None:
            yield from known(node.lineno, texts_of(argument, tree))


def known(line: int, texts: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Those that say something of their own."""
    for text in texts:
        text = re.sub(f"{GAP}+", GAP, text)
        if re.search(r"[A-Za-z]{3}", text.replace("expected", "")) and " " in text:
            yield line, text


def argument_of(call: ast.Call) -> ast.expr | None:
    """The text of a call that makes an exception, warns, or ends the program."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    to_stderr = any(one.arg == "file" and ast.unparse(one.value) == "sys.stderr" for one in call.keywords)
    if (
        last.endswith("Error")
        or name in ("warnings.warn", "sys.exit")
        or last == "error"
        and "parser" in name
    ):
        return call.args[0] if call.args else None
    if name == "print" and to_stderr:
        return call.args[0]
    return call.args[1] if name == "torch._check_value" else None


def texts_of(node: ast.expr, tree: ast.Module) -> Iterator[str]:
    """The texts that an expression may be; names are looked up among what the file assigns and defines."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for first in texts_of(node.left, tree):
            for second in [*texts_of(node.right, tree)] or [GAP]:
                yield first + second
    elif isinstance(node, ast.IfExp):
        yield from texts_of(node.body, tree)
        yield from texts_of(node.orelse, tree)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts_of(value, tree)
    elif isinstance(node, ast.Name):
        for other in ast.walk(tree):
            targets = other.targets if isinstance(other, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == node.id for target in targets):
                if not isinstance(other.value, ast.Name):
                    yield from texts_of(other.value, tree)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        for other in ast.walk(tree):
            if isinstance(other, ast.FunctionDef) and other.name == node.func.id:
                for part in ast.walk(other):
                    if isinstance(part, ast.Return) and part.value is not None:
                        yield from texts_of(part.value, tree)


def in_cpp(text: str) -> Iterator[tuple[int, str]]:
    for found in re.finditer(r"\bSTD_TORCH_CHECK\(", text):
        arguments = split_arguments(text, found.end())
        parts = [literal(argument) for argument in arguments[1:]]
        yield from known(text.count("\n", 0, found.start()) + 1, iter(["".join(parts)]))


def split_arguments(text: str, start: int) -> list[str]:
    """The arguments of a call whose parenthesis opens before ``start``."""
    depth, arguments, begun, position = 1, [], start, start
    while depth:
        one = text[position]
        if one in "\"'":
            position += 1
            while text[position] != one:
                position += 2 if text[position] == "\\" else 1
        depth += (one in "([{") - (one in ")]}")
        if depth == 1 and one == "," or depth == 0:
            arguments.append(text[begun:position].strip())
            begun = position + 1
        position += 1
    return arguments


def literal(argument: str) -> str:
    """Adjacent string literals as their text; a choice of texts and anything else as a gap."""
    if re.fullmatch(r'("(?:[^"\\]|\\.)*"\s*)+', argument):
        return "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', argument))
    return GAP


def patterns() -> list[str]:
    """The lines of every block of messages on the page."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern with <names> for what varies: a gap, a word or nothing, so that all else is the message's."""
    parts = re.split(r"<[^<>]*>", pattern)
    return re.compile(r"[^\s:]*".join(re.escape(part) for part in parts))
