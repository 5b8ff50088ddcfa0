"""The cases of `make guard`: one or two of each family, small enough to be measured for every change.

Each is a case of a suite, by the suite's file, family and name: its sizes and our function stand there alone.
"""

import importlib
from typing import NamedTuple

from benchmarks.harness.cases import Case


class Named(NamedTuple):
    suite: str
    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family} {self.name}"

    def found(self) -> Case:
        families = importlib.import_module(f"benchmarks.suites.{self.suite}").FAMILIES
        for case in families[self.family]():
            if case.name == self.name:
                return case
        raise KeyError(f"benchmarks/suites/{self.suite}.py has no case {self.name!r} of {self.family!r}")


# Of the dense form, by the names of shapes.py.
DENSE = ("many-rows", "one-output", "odd")
CASES = (
    Named("glu", "glu", "glu-1024-256-684"),
    Named("glu", "ranks", "mutan-512-510"),
    Named("gates", "diagonal", "middle"),
    Named("gates", "modulate", "tokens"),
    Named("norms", "residual", "8x256x384"),
    Named("hyper", "shared", "sequences"),
    Named("biaffine", "label", "label-100-20"),
    Named("segments", "many", "many"),
    Named("recurrent", "mlstm", "64x1x64x128"),
)
PASSES = ("forward", "forward+backward")
DTYPE = "float32"
