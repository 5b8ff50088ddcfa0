"""The error rule where PyTorch is nearly exact: few rows, equal rows; and where parts of a sum exceed it."""

import random

import pytest
import torch

from mi_kernels.ops.modulate.autograd import gate_grads
from mi_kernels.testing.checks import check_form_gradients, form_of
from mi_kernels.testing.samples import LAYOUTS, Modulation, Sample, Shape, term_subsets

# Of y: as y.sum() makes it; one row for all; or in another layout.
COTANGENTS = ("ones", "row", "transposed")
# Met by a search: the summation blocks of these were a whole sum, and PyTorch's were not.
KNOWN = {
    "ones": (Sample(Shape("short-sums", (14,), 1, 3, 34), layout="transposed"),),
    "row": (
        Sample(Shape("exact", (8,), 8, 3, 26), layout="offset"),
        Sample(Shape("one-feature", (17,), 1, 3, 8), layout="expanded"),
    ),
}


def cotangent(sample, kind, dtype, device, seed):
    size = (*sample.shape.lead, sample.shape.out) if isinstance(sample, Sample) else sample.shape
    if kind == "ones":
        return torch.ones((), dtype=dtype, device=device).expand(size)
    grad = sample.cotangent(dtype, device, seed)
    if kind in ("row", "column"):
        return (grad[:1] if kind == "row" else grad[..., :1]).expand(size)
    return Sample.cotangent(sample, dtype, device, seed, kind) if isinstance(sample, Sample) else grad


def check(sample, kind, dtype, device):
    def draw(seed):
        return cotangent(sample, kind, dtype, device, seed + 1000), *sample.arguments(dtype, device, seed)

    check_form_gradients(form_of(sample), draw, oracle=(sample, kind))


def drawn_samples(kind, count=1):
    generator = random.Random(f"small gradients {kind}")
    layouts = [layout for layout in LAYOUTS if layout != "expanded"]
    for _ in range(count):
        sizes = (generator.randint(8, 40) for _ in range(3))
        shape = Shape("drawn", (generator.randint(2, 24),), *sizes)
        yield Sample(shape, generator.choice(term_subsets()), generator.choice(layouts))


@pytest.mark.parametrize("kind", COTANGENTS)
def test_gradients_of_few_rows(kind, place):
    for sample in (*KNOWN.get(kind, ()), *drawn_samples(kind)):
        check(sample, kind, torch.float32, place.device)


@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.parametrize("reduced", ["rows", "features"])
def test_gradients_of_modulation_of_few_rows(reduced, kind, place):
    generator = random.Random(f"modulation {kind} {reduced}")
    sizes = [(6, 8), (13, 8), *((generator.randint(2, 40), generator.randint(8, 40)) for _ in range(1))]
    for rows, width in sizes:
        scale = (rows, 1) if reduced == "features" else (width,)
        sample = Modulation(
            "few", (rows, width), scale, scale, activation=generator.choice(("identity", "tanh"))
        )
        check(sample, kind, torch.float32, place.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_of_a_sum_are_larger_than_the_whole(dtype, place):
    """Two halves of the batch that nearly cancel; in float16 each is beyond its range."""
    sample = Sample(Shape("halves", (128,), 5, 7, 6), (False, True, True, True))

    def draw(seed):
        x, z, _, *weights = sample.arguments(dtype, place.device, seed)
        grad = sample.cotangent(dtype, place.device, seed)
        x, z, grad = (torch.cat([t[:64].abs() + 1] * 2) for t in (x, z, grad))
        grad *= 1500
        grad[64:] *= -0.98
        weights = [t / 64 for t in weights]  # dx and dz stay in the range
        return grad, x, z, None, *weights

    check_form_gradients(form_of(sample), draw)


@pytest.mark.parametrize("magnitude", [0.3, 3, 8])
@pytest.mark.parametrize("width", [2, 5, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softmax_gate_is_rounded_once(dtype, width, magnitude):
    """First and second order of softmax(p) x, without the products that make p."""

    def reference(grad, x, gate):
        return torch.autograd.grad(torch.softmax(gate, -1) * x, (x, gate), grad, create_graph=True)

    def ours(grad, x, gate):
        return gate_grads("portable", (True, True), "softmax", 0.0, grad, x, gate)

    def derivatives(function, tensors):
        *leaves, x_c, gate_c = (t.detach().requires_grad_() for t in tensors)
        first = function(*leaves)
        return [*first, *torch.autograd.grad(first, leaves, (x_c, gate_c))]

    generator = torch.Generator().manual_seed(width)
    tensors = [torch.randn(1000, width, generator=generator) for _ in range(5)]
    tensors[2] *= magnitude
    tensors = [t.to(dtype) for t in tensors]
    truth = derivatives(reference, [t.double() for t in tensors])
    results = zip(derivatives(ours, tensors), derivatives(reference, tensors), truth, strict=True)
    for found, rival, exact in results:
        assert (found - exact).norm() <= 2 * (rival - exact).norm()
