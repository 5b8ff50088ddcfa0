"""All pairs of inputs and contexts by the kernel of the biaffine form: values, derivatives, the choice."""

import pytest
import torch
from helpers import Spy

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.ops.interaction import all_pairs, cost_model, reference
from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.samples import ORDERS, WEIGHT_ONLY, Sample, Shape

# In which dimensions x and z have their leading sizes, and whether y is in the order of a plan.
FORMS = {
    "x-last": ((2, 1, 9), (2, 8, 1)),
    "z-last": ((2, 9, 1), (2, 1, 8)),
    "no-samples": ((9,), (8, 1)),
    "several": ((3, 1, 1, 4, 2), (3, 4, 2, 1, 1)),
    "across": ((3, 1, 4, 1), (1, 3, 1, 5)),
}
SERVED = [name for name in FORMS if name != "across"]
TERMS = (WEIGHT_ONLY, (True, False, False, True))


@pytest.fixture
def always(monkeypatch):
    """Wherever y is in the order of a plan, whatever that costs."""
    if backends.choose(torch.zeros(1)) != "cpu":
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(all_pairs, "is_served", lambda plan, costs, out: True)


def shape_of(name, out=3):
    x_lead, z_lead = FORMS[name]
    return Shape(name, x_lead, 5, 7, out, context_batch=z_lead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", TERMS, ids=("W", "Wc"))
@pytest.mark.parametrize("name", SERVED)
def test_error_rule(name, terms, dtype, always):
    for out in (1, 3):
        sample = Sample(shape_of(name, out), terms)
        y = mi.interaction(*sample.arguments(dtype))
        assert y.shape == (*sample.shape.lead, out) and y.is_contiguous()
        check_values(sample, dtype)
        check_gradients(sample, dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SERVED)
def test_equals_the_reference(name, order, always):
    leaves = Sample(shape_of(name), TERMS[1], order=order).arguments(torch.float64, requires_grad=True)
    present = [t for t in leaves if t is not None]
    results = []
    for function in (mi.interaction, reference.interaction):
        y = function(*leaves)
        first = torch.autograd.grad(y.cos().sum(), present, create_graph=True)
        second = torch.autograd.grad(sum(t.pow(2).sum() for t in first), present)
        results.append([y, *first, *second])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FORMS)
def test_which_calls_are_pairs(name, always):
    leaves = Sample(shape_of(name), TERMS[1]).arguments(torch.float32, requires_grad=True)
    x, z, weight, _, _, bias = leaves
    served = all_pairs.pairs("cpu", x, z, (weight, None, None, bias))
    assert (served is not None) == (name in SERVED)
    if served is not None:
        assert served.plan == (cost_model.PER_Z if name == "z-last" else cost_model.PER_X)
    assert all_pairs.pairs("cpu", x, z, (weight, weight.sum(2), None, bias)) is None
    assert all_pairs.pairs("cpu", x, z, (weight, None, weight.sum(1), bias)) is None
    every = z.expand(*torch.broadcast_shapes(*FORMS[name]), z.shape[-1])
    assert all_pairs.pairs("cpu", x, every, (weight, None, None, bias)) is None
    with Spy() as spy:  # a mode sees the operations of the plans
        mi.interaction(*leaves)
    assert "cpu_biaffine" not in spy.names


@pytest.mark.parametrize(
    ("x_lead", "z_lead", "out", "plan"),
    [
        ((2, 1, 100), (2, 100, 1), 8, cost_model.PER_X),
        ((2, 100, 1), (2, 1, 100), 8, cost_model.PER_Z),
        ((2, 1, 200), (2, 20, 1), 8, None),  # layers of the longer sequence would be the dearer ones
        ((2, 1, 20), (2, 200, 1), 8, cost_model.PER_X),
        ((2, 1, 200), (2, 20, 1), 1, cost_model.PER_X),  # a single output is in both orders
        ((2, 1, 2), (2, 2, 1), 8, None),  # fused
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_choice(x_lead, z_lead, out, plan, gradients):
    x, z = torch.zeros(*x_lead, 64), torch.zeros(*z_lead, 64)
    weight = torch.zeros(out, 64, 64, requires_grad=gradients)
    if backends.choose(x) != "cpu":
        pytest.skip("no compiled kernels")
    explained = mi.explain(mi.interaction, x, z, weight)
    assert ("biaffine" in explained.why) == (plan is not None)
    assert plan is None or explained.algorithm == plan
    found = all_pairs.eager("cpu", x, z, weight, None, None, None)
    assert (found is not None) == (plan is not None)
    assert found is None or found.shape == (*torch.broadcast_shapes(x_lead, z_lead), out)
    general = all_pairs.interaction("cpu", x, z, (weight, None, None, None))
    assert (general is not None) == (plan is not None)
