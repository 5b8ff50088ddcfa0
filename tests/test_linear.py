"""Products without W where there are many rows: outputs in the lanes, sums in one stretch or in several."""

import pytest
import torch
from helpers import gradients_of, reference_gradients

import mi_kernels as mi
from mi_kernels.ops.interaction import reference
from mi_kernels.testing.errors import check_errors
from mi_kernels.testing.samples import Sample, Shape

ALL = (True,) * 6
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The matrix is packed in stretches of 256 words; lanes are 4 to 16 wide; tiles are 4 or 8 rows high.
SHAPES = {
    "plain": (Shape("plain", (300,), 64, 96, 128), (False, True, True, True)),
    "odd": (Shape("odd", (203,), 33, 101, 79), (False, True, True, True)),
    "long": (Shape("long", (450,), 531, 9, 61), (False, True, False, True)),
    "two-stretches": (Shape("two-stretches", (500,), 601, 17, 48), (False, True, True, False)),
    "one-output": (Shape("one-output", (300,), 48, 20, 1), (False, True, True, True)),
    "regions": (Shape("regions", (2100,), 16, 20, 300), (False, True, False, False)),
    "nothing-to-sum": (Shape("nothing-to-sum", (200,), 0, 40, 50), (False, True, True, True)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("name", SHAPES)
def test_error_rule(name, layout, dtype, place):
    sample = Sample(*SHAPES[name], layout)

    def both(grad, *arguments):
        copies = [None if t is None else t.requires_grad_() for t in arguments]
        y = mi.interaction(*copies)
        return (y.detach(), *gradients_of(y, copies, grad, ALL))

    def expected(grad, *arguments):
        return (reference.interaction(*arguments), *reference_gradients(ALL)(grad, *arguments))

    check_errors(
        both,
        expected,
        lambda seed: (
            sample.cotangent(dtype, place.device, seed + 1000),
            *sample.arguments(dtype, place.device, seed),
        ),
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 8, 70])
def test_generated_weights(rows, dtype, groups, place):
    """Groups, and matrices that lie along their outputs, with a few rows each."""

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(groups, rows, 37, generator=generator).to(dtype)
        w = torch.randn(groups, 37, 80, generator=generator).to(dtype)
        return x.to(place.device), w.to(place.device)

    check_errors(
        lambda x, w: [mi.apply_generated(x, w.mT.unsqueeze(1))],
        lambda x, w: [torch.einsum("gtj,gjo->gto", x, w)],
        draw,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, place):
    """Of the same number of rows, so that both calls have one plan."""
    x, z, _, u, v, c = Sample(*SHAPES["odd"]).arguments(dtype, place.device)
    y = mi.interaction(x, z, None, u, v, c)
    x, z = x.roll(1, 0), z.roll(1, 0)
    x[0] = z[0] = float("nan")
    moved = mi.interaction(x, z, None, u, v, c)
    assert torch.equal(y[:-1], moved[1:])
