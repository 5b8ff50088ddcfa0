"""Asynchronous use of a GPU: CUDA graphs, a host that does not wait, streams, a second device.

What needs a GPU is skipped without one and **has not run on one**. The same bodies run on the CPU, where a
recording of PyTorch's operations stands in for a graph, and all calls run on tensors without data, which fail
where the host looks at a number.
"""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.testing.errors import relative_error
from mi_kernels.testing.samples import GATE_ODD, GATE_TERMS, MAPS, ODD, GateSample, Modulation, Sample, Shape
from mi_kernels.testing.without_data import WithoutData

pytestmark = pytest.mark.tools

SPLIT = Shape("split", (20,), 40, 17, 20)  # on Triton several programs share a sum
SHARED = Shape("shared", (3, 8), 5, 6, 4, context_batch=(3, 1))


def _gate(op, activation):
    def function(x, z, *weights):
        *weights, weight_x = weights if op == "diagonal" else (*weights, None)
        options = {} if weight_x is None else {"weight_x": weight_x, "scale_offset": 0.5}
        return getattr(mi, op)(x, z, *weights, activation=activation, **options)

    return function, GateSample(op, GATE_ODD, GATE_TERMS[op])


def _apply_generated(x, z, *weights):
    w, b = mi.generate(z.squeeze(1), *weights)
    return mi.apply_generated(x, w.unsqueeze(1), b.unsqueeze(1))


# By name: the function, and the sample that its arguments are drawn from.
CALLS = {
    "interaction": (mi.interaction, Sample(ODD)),
    "interaction-split": (mi.interaction, Sample(SPLIT)),
    "interaction-shared": (mi.interaction, Sample(SHARED)),
    "bilinear": (lambda x, z, w, c: mi.bilinear(z, x, w, c), Sample(ODD, (True, False, False, True))),
    "apply_generated": (_apply_generated, Sample(SHARED)),
    "diagonal": _gate("diagonal", "gelu"),
    "diagonal-softmax": _gate("diagonal", "softmax"),
    "gated_interaction": _gate("gated_interaction", "sigmoid"),
    "modulate": (lambda *a: mi.modulate(*a, activation="tanh"), MAPS),
    "modulate-rows": (mi.modulate, Modulation("rows", (70, 33), (33,), (70, 1))),
}
EVERY_CALL = pytest.mark.parametrize("name", CALLS)
ORDERS = pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "second-order"])
DTYPE = torch.bfloat16  # on a GPU: the kernels that matter most there, and few to compile
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "unique_consecutive")


def draw(name, dtype, device, seed=0):
    arguments = CALLS[name][1].arguments(dtype, device, seed)
    return [t.detach().requires_grad_() for t in arguments if t is not None]


def results(name, leaves, order):
    """y; with order 1 also the gradients of |y|^2, with order 2 those of their squares as well."""
    found = last = [CALLS[name][0](*leaves)]
    for _ in range(order):
        value = sum(t.float().square().sum() for t in last)
        last = torch.autograd.grad(value, leaves, create_graph=True)
        found = [*found, *last]
    return [t.detach() for t in found]


def agree(found, expected, dtype):
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other.double()) <= limit


def captured(run, device):
    """A call in a CUDA graph: what runs it again, and its results in the memory that it writes."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # compile, load, choose
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


def is_captured_and_replayed(name, order, dtype, device):
    leaves = draw(name, dtype, device)
    replay, found = captured(lambda: results(name, leaves, order), device)
    for seed in (1, 2):
        fresh = draw(name, dtype, device, seed)
        with torch.no_grad():
            for leaf, values in zip(leaves, fresh, strict=True):
                leaf.copy_(values)
        replay()
        agree(found, results(name, fresh, order), dtype)


def does_not_wait(name, order, dtype, device):
    leaves = draw(name, dtype, device)
    results(name, leaves, order)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(name, leaves, order)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def follows_its_stream(name, order, dtype, device):
    """On another stream than the default one the numbers come late: no kernel may run ahead of them."""
    fresh = draw(name, dtype, device)
    expected = results(
        name, fresh, order
    )  # nothing is left to compile, which would take longer than the wait
    leaves = [torch.full_like(t, float("nan")).requires_grad_() for t in fresh]
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        with torch.no_grad():
            for leaf, values in zip(leaves, fresh, strict=True):
                leaf.copy_(values)
        found = results(name, leaves, order)
    main.wait_stream(side)
    agree(found, expected, dtype)


def runs_beside(name, order, dtype, device, other):
    """On tensors of a device that is not the current one."""
    before = torch.cuda.current_device()
    found = results(name, draw(name, dtype, other), order)
    assert all(t.device == torch.device(other) for t in found) and torch.cuda.current_device() == before
    agree([t.to(device) for t in found], results(name, draw(name, dtype, device), order), dtype)


def trains(run_of, device):
    """Three steps of a layer that runs some other way, and of its twin."""
    x, z, *_ = (t.detach() for t in draw("interaction", torch.float32, device))
    layer = mi.nn.MultiplicativeInteraction(7, context_features=3, out_features=11, device=device)
    twin = copy.deepcopy(layer)
    for one, run in ((layer, layer), (twin, run_of(twin, (x, z)))):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            run(x + step, z).square().mean().backward()
            optimizer.step()
    agree(list(twin.parameters()), list(layer.parameters()), torch.float32)


def _graphed(layer, inputs):
    return torch.cuda.make_graphed_callables(layer, inputs)


def _compiled_with_graphs(layer, inputs):
    return torch.compile(layer, mode="reduce-overhead", fullgraph=True)


@pytest.fixture
def gpu(place):
    if place.device != "cuda":
        pytest.skip("needs a GPU; test_*_without_a_gpu run the same body on the CPU")
    return place.device


@EVERY_CALL
@ORDERS
def test_captured_and_replayed(name, order, gpu):
    is_captured_and_replayed(name, order, DTYPE, gpu)


@EVERY_CALL
@ORDERS
def test_the_host_does_not_wait(name, order, gpu):
    does_not_wait(name, order, DTYPE, gpu)


@EVERY_CALL
def test_the_current_stream(name, gpu):
    follows_its_stream(name, 2, DTYPE, gpu)


@EVERY_CALL
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_device(name, gpu):
    runs_beside(name, 1, DTYPE, "cuda:0", "cuda:1")


@pytest.mark.parametrize("run_of", [_graphed, _compiled_with_graphs])
def test_a_layer_in_graphs_trains(run_of, gpu, fresh_compiler):
    trains(run_of, gpu)


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph on the CPU: the operations of a call, run again into the same memory."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in WAITING:
            raise RuntimeError(f"{func} waits for the device")
        results = func(*args, **(kwargs or {}))
        if torch.Tag.inplace_view not in func.tags:  # of the shape alone, which a graph has no part in
            kept = [result.detach() for result in tree_leaves(results)]
            self.steps.append((func, args, kwargs or {}, kept))
        return results

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.steps:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # no view
                    old.copy_(new)


@pytest.fixture
def pretended(monkeypatch, place):
    """On the CPU: calls of torch.cuda that do nothing but record and replay."""
    if place.device != "cpu":
        pytest.skip("there is a GPU")
    for name in ("Stream", "stream", "current_stream", "_sleep", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda layer, inputs: layer)


@EVERY_CALL
@ORDERS
def test_bodies_without_a_gpu(name, order, pretended):
    is_captured_and_replayed(name, order, torch.float32, "cpu")
    does_not_wait(name, order, torch.float32, "cpu")
    if order:
        follows_its_stream(name, order, torch.float32, "cpu")
        runs_beside(name, order, torch.float32, "cpu", "cpu")


def test_training_without_a_gpu(pretended, fresh_compiler):
    trains(_graphed, "cpu")
    trains(_compiled_with_graphs, "cpu")


@EVERY_CALL
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_no_call_looks_at_a_number(name, backend, monkeypatch):
    """To the second order, each operation down to its launches."""
    for waiting in ("synchronize", "Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, waiting, mock.Mock(side_effect=AssertionError(waiting)))
    monkeypatch.setattr(backends, "choose", lambda tensor, family="interaction": backend)
    leaves = [
        torch.empty_like(t, device="meta", requires_grad=True) for t in draw(name, torch.bfloat16, "cpu")
    ]
    if backend == "portable":
        recorded = nullcontext([])
    else:
        pytest.importorskip("triton")
        from mi_kernels.ops.triton.launch import recording

        recorded = recording((9, 0))
    with recorded as launches, WithoutData() as watch:
        assert len(results(name, leaves, 2)) == 1 + 2 * len(leaves)
    assert watch.names and all(called.endswith(backend) for called in watch.names)
    # dc alone is a sum of PyTorch's.
    assert backend == "portable" or len(launches) >= 0.9 * len(watch.names)
