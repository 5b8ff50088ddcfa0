"""torch.utils.flop_counter counts what the formulas need; nothing slow is imported for its sake."""

import subprocess
import sys

import pytest
import torch
from calls import CALLS
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mi_kernels as mi
from mi_kernels.ops import rules
from mi_kernels.ops.library import DEFINED, twins
from mi_kernels.testing.samples import GATE_ODD, ODD, Sample, Shape

ELEMENTWISE = ("modulate", "mix", "norm", "norm-residual")  # counted as nothing, as by PyTorch


@pytest.fixture(autouse=True)
def _always_asks(monkeypatch):
    monkeypatch.setattr(rules, "MIN_QUERY_WORK", 0)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def rows(shape):
    return shape.sizes()[0][0], shape.context, shape.width, shape.out


def test_forward_and_backward(place):
    tensors = Sample(ODD).arguments(torch.float32, place.device, requires_grad=True)
    b, z, x, o = rows(ODD)
    assert counted(lambda: mi.interaction(*tensors)) == 2 * b * o * (z * x + z + x)
    y = mi.interaction(*tensors).sum()
    every = 2 * 2 * b * o * (z * x + z + x)
    assert counted(lambda: torch.autograd.grad(y, tensors, retain_graph=True)) == every
    assert counted(lambda: torch.autograd.grad(y, tensors[0], retain_graph=True)) == 2 * b * o * (z * x + x)
    assert counted(lambda: torch.autograd.grad(y, tensors[1], retain_graph=True)) == 2 * b * o * (z * x + z)
    assert counted(lambda: torch.autograd.grad(y, tensors[2], retain_graph=True)) == 2 * b * o * z * x
    assert counted(lambda: torch.autograd.grad(y, tensors[5], retain_graph=True)) == 0


def test_gates_and_modulation(place):
    b, z, x, _ = rows(GATE_ODD)

    def forward(name):
        call = CALLS[name]
        tensors = call.arguments(torch.float32, place.device)
        return counted(lambda: call(*tensors))

    assert forward("gated") == 2 * b * x * (z * x + z + x)
    assert forward("diagonal") == 2 * b * x * (2 * z + x)
    assert forward("modulate") == 0  # elementwise, as in PyTorch's own formulas


def test_groups_and_shared_contexts(place):
    """A product for each group is as much as one of all rows; generated weights are counted as such."""
    shape = Shape("tokens", (3, 40), 5, 6, 7, context_batch=(3, 1))
    tensors = Sample(shape, (True, False, False, False)).arguments(torch.float32, place.device)
    generated = 2 * 3 * 5 * 6 * 7 + 2 * 3 * 40 * 6 * 7
    x, z, weight, *_ = tensors
    apply = mi.apply_generated(x, mi.generate(z, weight)[0])
    assert counted(lambda: mi.apply_generated(x, mi.generate(z, weight)[0])) == generated
    assert apply.shape == (3, 40, 7)


def test_groups_of_nothing(place):
    x, weight = torch.ones(0, 3, 8, device=place.device), torch.ones(0, 1, 5, 8, device=place.device)
    assert counted(lambda: mi.apply_generated(x, weight)) == 0


@pytest.mark.parametrize("name", CALLS)
def test_no_call_counts_nothing(name, place):
    call = CALLS[name]
    tensors = call.arguments(torch.float32, place.device)
    y = call(*tensors)
    forward, backward = counted(lambda: call(*tensors)), counted(lambda: y.sum().backward())
    assert (forward > 0) == (backward > 0) == (name not in ELEMENTWISE)
    if name not in ELEMENTWISE:
        # Gradients of a state are needed step by step: they share no product with those of x.
        assert 1.3 <= backward / forward <= (3 if name == "second-order" else 2.2)


def test_every_operation_has_a_formula():
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("mi_kernels::")]
    kernels = {s.name.split("::")[1] for s in schemas if "Tensor" in str(s.returns[0].type)}
    kernels = {name for name in kernels if not name.startswith("differentiable_")}
    # Of integers alone; and never where a mode counts (ops/interaction/linear.py, biaffine.py).
    kernels -= {"segment_order", "cpu_linear", "cpu_linear_add", "cpu_linear_grads", "cpu_biaffine"}
    plain = {name.removesuffix("_portable").removesuffix("_triton") for name in kernels}
    assert plain == set(DEFINED)
    for name in DEFINED:
        assert all(operation.overloadpacket in flop_registry for operation in twins(name))


ORDERS = (
    "import mi_kernels, torch.utils.flop_counter",
    "import torch.utils.flop_counter, mi_kernels",
    "from torch.utils.flop_counter import flop_registry; import mi_kernels",
    "import importlib.util, mi_kernels; importlib.util.find_spec('torch.utils.flop_counter')",
    "import importlib, mi_kernels, torch.utils.flop_counter as f; importlib.reload(f)",
)


@pytest.mark.subprocess
def test_in_any_order_of_imports():
    """Each in a fork of one process that has imported torch alone, which takes longer than all the rest."""
    program = f"""
import os, sys, torch
assert not {{"mi_kernels", "torch.utils.flop_counter"}} & sys.modules.keys()
for imports in {ORDERS}:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, imports
        continue
    exec(imports)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        mi_kernels.interaction(torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 4, 3))
    assert counter.get_total_flops() == 240, counter.get_total_flops()
    sys.exit()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.subprocess
def test_the_import_is_as_light_as_that_of_torch():
    """Dynamo alone would double the time of a start."""
    program = """
import sys, torch
before = set(sys.modules)
import mi_kernels
heavy = ("torch._dynamo", "torch._inductor", "triton", "torch.utils.flop_counter", "torch.distributed.tensor")
found = [name for name in sys.modules if name in heavy and name not in before]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
