"""The CPU kernels of multiplicative RNNs at the sizes at which they take another way.

Units that end inside of a vector and fill one to three of them, rows of more than a chain, a single step,
whose matrices stay where they are, threads, and each instruction set. The judge is the portable
implementation: in float64 to 1e-12, in other dtypes by its own error.
"""

import pytest
import torch
from helpers import assert_passes
from recurrent_cases import Case, backward, check, forward, saved_of, tangents

from mi_kernels import backends, libraries
from mi_kernels.ops.recurrent.forms import KINDS

pytestmark = pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")

OPS = torch.ops.mi_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "gaps")
UNITS, ROWS, STEPS = (1, 16, 17, 48, 49, 100), (1, 2, 3, 7, 8, 13, 65), (1, 3)
FORMS = (
    *({"kind": kind} for kind in KINDS),
    {"kind": "mlstm", "state": 20},
    {"kind": "mi_lstm", "state": 49},
    {"kind": "mlstm", "hh": True},
    {"kind": "second_order", "hh": True},
    {"kind": "second_order", "low": True, "hh": True},
)


def lengths(steps, rows):
    return tuple((2 * row + 1) % (steps + 1) for row in range(rows))


def cases():
    """Each form with each number of units; rows, steps, layouts and lengths take turns."""
    for i, form in enumerate(FORMS):
        for j, units in enumerate(UNITS):
            rows, steps = ROWS[(i + j) % len(ROWS)], STEPS[(i + j // 2) % len(STEPS)]
            own = {"lengths": lengths(steps, rows)} if (i + j) % 3 == 2 else {}
            own |= {"layout": LAYOUTS[(i + 2 * j) % len(LAYOUTS)], "reverse": (i // 2 + j) % 2 == 1}
            factors = 3 if KINDS[form["kind"]].structure == "dense" and "low" not in form else units
            yield Case(T=steps, B=rows, H=units, factors=factors, **form, **own)


def single_steps():
    """Of few and of more rows, with weights that are contiguous along either axis."""
    for rows in (1, 5, 16, 17):
        for index, form in enumerate(FORMS):
            layout = LAYOUTS[(index + rows) % 2]
            yield Case(
                T=1, B=rows, H=49, factors=33 if form["kind"] != "second_order" else 3, layout=layout, **form
            )


def draws(case):
    """How many times the numbers are drawn, so that 600 elements of the smallest result are compared."""
    return min(-(-600 // (case.B * min(case.H, case.state or case.H))), 100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*cases(), *single_steps()], ids=str)
def test_error_rule(case, dtype):
    check(OPS, case, dtype, draws(case))


LARGE = [
    Case(B=rows, H=100, factors=90, **form) for rows, form in zip((13, 65, 150) * 4, FORMS, strict=False)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_threads_change_no_bit(case, dtype):
    found, before = [], torch.get_num_threads()
    operands = case.operands(dtype)
    saved = saved_of(case, operands)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            derivatives = (call(OPS, case, operands, saved) for call in (backward, tangents))
            found.append([*forward(OPS, case, operands), *(t for results in derivatives for t in results)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.subprocess
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_other_instruction_sets(isa):
    if isa not in libraries.cpu_isa()["supported"] or isa == libraries.cpu_isa()["selected"]:
        pytest.skip(f"this machine or build has no {isa}, or every other test runs on it")
    chosen = "test_error_rule and (T3 and bfloat16 or T1 and float32)"
    assert_passes("-k", chosen, "test_recurrent_cpu.py", least=90, MI_KERNELS_CPU_ISA=isa)
