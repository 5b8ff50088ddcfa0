"""llms.txt, the short file for assistants: its names exist, its example runs, and it leaves nothing out."""

import inspect
import re
from pathlib import Path

import pytest

import mi_kernels as mi
from mi_kernels import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "llms.txt").read_text() if (ROOT / "llms.txt").exists() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="no checkout")
# Types, and what serves one function alone.
LEFT_OUT = {"ActivationName", "BackendName", "ConversionReport", "HeadPart", "PackedWeight", "Patch", "Plan"}
LEFT_OUT |= {"RecurrentName", "__version__", "nn"}


def test_it_is_short():
    assert len(TEXT) < 6500


def test_every_name_exists_and_no_function_is_left_out():
    named = set(re.findall(r"\bmi\.((?:nn\.)?(?:rules\.)?\w+)", TEXT))
    for name in named:
        found = mi
        for part in name.split("."):
            found = getattr(found, part, None)
        assert found is not None, f"mi.{name}"
    assert set(mi.__all__) - LEFT_OUT <= named
    modules = re.search(r"## Modules\n\n(.*?)\n\n", TEXT, re.S)[1]
    assert sorted(re.findall(r"\w+", modules.replace("mi.nn.", ""))) == sorted(mi.nn.__all__)


def test_signatures_are_those_of_the_functions():
    for name, arguments in re.findall(r"^- mi\.(\w+)\(([^)]*)\)?", TEXT, re.M):
        if name in ("explain", "convert", "patch", "backend"):
            continue
        parameters = inspect.signature(getattr(mi, name)).parameters
        for written in re.findall(r"(?:^|, )(\w+)", re.sub(r"=\([^)]*", "=", arguments)):
            assert written in parameters, f"mi.{name}: {written}"


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(code, {})
    assert "backend" in capsys.readouterr().out


def test_the_commands_exist_and_none_is_left_out():
    (commands,) = [action for action in cli._parser()._actions if action.dest == "command"]
    written = re.search(r"^- python -m mi_kernels (.*)$", TEXT, re.M)[1]
    page = (ROOT / "docs" / "versioning.md").read_text()
    public = re.search(r"`python -m mi_kernels ([\w |]+)`", page)[1]
    assert set(commands.choices) <= set(re.findall(r"\w+", written))
    assert set(commands.choices) == set(public.split(" | "))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name in re.findall(r"make ([\w-]+)", TEXT):
        assert name in targets, f"make {name}"
