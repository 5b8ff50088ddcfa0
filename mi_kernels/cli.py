"""The command line: `python -m mi_kernels doctor | verify | demo | bench | tune | schemas`."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ._version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mi-kernels",
        description="Fused kernels for multiplicative interactions in PyTorch.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mi_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what is installed, what runs here and why the rest does not", allow_abbrev=False
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_parser(
        "schemas", help="the operations as C++, for programs that run without Python", allow_abbrev=False
    )
    # These parse their own arguments, including --help.
    for name, summary in (
        ("verify", "check the compiled kernels on this GPU, so that they are used by default"),
        ("demo", "train a model with nn.Bilinear, convert it, and compare both"),
        ("bench", "measure against the alternatives (needs a checkout of the repository)"),
        ("tune", "time the tiles of the Triton kernels on this GPU and write the table of choices"),
    ):
        commands.add_parser(name, help=summary, add_help=False, allow_abbrev=False)
    return parser


def _doctor(as_json: bool) -> int:
    from . import doctor

    print(doctor.as_json() if as_json else doctor.as_text())
    return 0


def _demo(arguments: Sequence[str]) -> int:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            raise
        print(f"The demo needs {error.name}: pip install 'mi_kernels[bench]'", file=sys.stderr)
        return 1
    return demo.main(arguments)


def _bench(arguments: Sequence[str]) -> int:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
    if not script.is_file():
        print(
            f"The benchmarks are not part of the installed package ({script} does not exist): "
            "run this command in a checkout of the repository installed with `pip install -e`.",
            file=sys.stderr,
        )
        return 1
    try:
        return subprocess.call([sys.executable, str(script), *arguments])
    except KeyboardInterrupt:  # the child was interrupted, too, and has printed it
        return INTERRUPTED


INTERRUPTED, CLOSED = 130, 141  # a shell's status of a command killed by SIGINT or SIGPIPE


def without_traceback(program: str, run: Callable[[], int]) -> int:
    """The exit status of ``run``, also if it is interrupted or its output is a closed pipe."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout at exit; redirect it so that this does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED


def main(argv: Sequence[str] | None = None) -> int:
    return without_traceback("mi-kernels", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.command == "demo":
        return _demo(rest)
    if options.command == "bench":
        return _bench(rest)
    if options.command == "tune":
        from . import tune

        return tune.main(rest)
    if options.command == "verify":
        from . import verify

        return verify.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "schemas":
        from . import schemas

        print(schemas.as_cpp(), end="")
        return 0
    return _doctor(options.json)
