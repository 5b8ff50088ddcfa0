"""The files of the public CI: their shape, and that what they call is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="no checkout")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_make_targets_and_variables_are_there(path):
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"\bmake (.+)$", "\n".join(commands(path)), re.MULTILINE):
        words = re.sub(r'"[^"]*"|\$\{\{.*?\}\}', "value", line).split()
        targets = [word for word in words if "=" not in word]
        assert targets and set(targets) <= TARGETS, line
        for name in (word.partition("=")[0] for word in words if "=" in word):
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE) or name == "CXX", line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_have_a_machine_and_steps(path):
    """Without a parser: indentation by two, and the keys of each job."""
    text = path.read_text()
    assert "\t" not in text and re.search(r"^on:$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert all((len(line) - len(line.lstrip())) % 2 == 0 for line in lines)
    jobs = re.split(r"^  (?=\w[\w-]*:$)", text.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:]
    assert jobs
    for job in jobs:
        keys = set(re.findall(r"^    ([\w-]+):", job, re.MULTILINE))
        assert {"runs-on", "steps"} <= keys or "uses" in keys, job
        for step in re.findall(r"^      - (.+)$", job, re.MULTILINE):
            assert re.match(r"(uses|run|if|\{ name): ", step), step


def commands(path: Path) -> list[str]:
    return re.findall(r"^\s+(?:- )?run: (.+)$", path.read_text(), re.MULTILINE)


def test_files_that_they_name_are_there():
    texts = "\n".join(path.read_text() for path in WORKFLOWS)
    named = re.findall(r"(?:run: python|uses:) (\S+)", texts)
    local = [name for name in named if "@" not in name]
    assert local and all((ROOT / name).is_file() for name in local), local


def test_the_matrix_has_what_the_package_promises():
    """From the oldest Python and torch of pyproject.toml on."""
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    axes = dict(re.findall(r"^ +(python|torch): \[(.+)\]$", text, re.MULTILINE))
    assert axes["python"].startswith(f'"{python}"') and axes["torch"].startswith(f'"{torch}.')
