"""The command line: options as they are written, Ctrl-C and closed pipes without a traceback."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment_of_pytest, interruptible

import mi_kernels as mi
from mi_kernels import cli, demo, doctor, tune, verify

pytestmark = pytest.mark.subprocess

PACKAGE = Path(mi.__file__).parent
ROOT = Path(__file__).parents[2]
HAS_BENCH = (PACKAGE.parent / "benchmarks" / "run.py").is_file()
FOLDERS = ("mi_kernels", "benchmarks", "tools", "examples", "studies")
COMMANDS = {"doctor": "--jso", "verify": "--minute=1", "demo": "--step=3", "tune": "--size=1,1,1,1"}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_not_abbreviated(command, capsys):
    for unknown in (COMMANDS[command], "--unknown", "extra"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, unknown])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.splitlines()[-1].startswith("mi-kernels")
    with pytest.raises(SystemExit):
        cli.main(["--vers"])


@pytest.mark.skipif(not HAS_BENCH, reason="the benchmarks are not part of the installed package")
def test_options_of_bench_are_not_abbreviated():
    done = run("bench", "--round", "1")
    assert done.returncode == 2 and "unrecognized arguments: --round" in done.stderr


def test_no_parser_takes_abbreviations():
    """Every parser of the repository, those of the commands' options included."""
    files = [file for name in FOLDERS for file in (ROOT / name).rglob("*.py")]
    made = dict.fromkeys(FOLDERS, 0)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "attr", None)
            if name in ("ArgumentParser", "add_parser"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_abbrev") == "False", f"{file.name}:{node.lineno}"
                made[file.relative_to(ROOT).parts[0]] += 1
    assert all(made.values()), made


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", [*COMMANDS, "bench"])
def test_an_interrupted_command_says_so_in_one_line(command, monkeypatch, capsys):
    for module, name in ((doctor, "as_text"), (verify, "main"), (demo, "main"), (tune, "main")):
        monkeypatch.setattr(module, name, interrupt)
    monkeypatch.setattr(subprocess, "call", interrupt)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # of the script of the benchmarks
    assert cli.main([command]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "" if command == "bench" else "mi-kernels: interrupted\n")


def started(*arguments):
    command = [sys.executable, "-m", "mi_kernels", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment_of_pytest(PYTHONUNBUFFERED=""), **pipes)


def run(*arguments):
    process = started(*arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
def test_a_command_that_is_interrupted_while_it_works(tmp_path):
    with interruptible():
        process = started("demo", "--steps", "1000000", "--output", str(tmp_path / "plot.png"))
    try:
        assert process.stdout.readline().startswith("mi_kernels ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()  # else it works for hours
    assert process.returncode == 130 and err == "mi-kernels: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
@pytest.mark.parametrize(
    "arguments", [["doctor"], ["doctor", "--json"], ["demo", "--steps", "2"], ["--help"]]
)
def test_a_closed_pipe_ends_a_command_quietly(arguments, tmp_path):
    if arguments[0] == "demo":
        arguments = [*arguments, "--output", str(tmp_path / "plot.png")]
    process = started(*arguments)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 141 and err == ""
