"""Modules on the devices of a mesh: by styles, DDP and FSDP2, compared with one process.

Over 400 lines: all of it runs in one group of processes, as starting one takes longer than the checks.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune

import mi_kernels as mi

R = Replicate()
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
Colwise, Rowwise = mi.parallel.Colwise, mi.parallel.Rowwise


def equal(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    torch.testing.assert_close(found, expected, **EXACT, msg=lambda text: f"{name}: {text}")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: torch.Tensor, mesh: Any, placement: Any) -> torch.Tensor:
    """What a device has of a tensor that is the same on all."""
    return distribute_tensor(tensor.detach(), mesh, [placement], src_data_rank=None).to_local().clone()


def counts(mode: CommDebugMode) -> dict[str, int]:
    return {str(op).split(".")[-1]: count for op, count in mode.get_comm_counts().items() if count}


@dataclass
class Case:
    """A module by styles: where its inputs and result lie, and the collectives of both passes."""

    module: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    plan: Any
    placements: Sequence[Any]
    result: Any
    forward: dict[str, int]
    backward: dict[str, int]


REDUCE = {"all_reduce": 1}
BOTH = {"all_reduce": 2}
_X, _Z, _T = (4, 6), (4, 3), (4, 3, 6)


def _dense(**others: Any) -> nn.Module:
    return mi.nn.MultiplicativeInteraction(6, context_features=3, out_features=5, **others)


def _low_rank() -> nn.Module:
    return mi.nn.LowRankInteraction(
        6, context_features=3, out_features=5, rank=7, weight_z=True, weight_x=True, activation_x="tanh"
    )


def _film(channel_dim: int) -> nn.Module:
    layer = mi.nn.FiLM(5, context_features=3, channel_dim=channel_dim)
    nn.init.normal_(layer.weight)
    return layer


def _biaffine(**others: Any) -> nn.Module:
    return mi.nn.Biaffine(6, 3, 5, bias=True, **others)


def _hyper_with_network() -> nn.Module:
    network = nn.Linear(3, 4)
    return mi.nn.HyperLinear(6, out_features=5, context_features=4, context_network=network)


_MLP = {"glu": Colwise(), "down": Rowwise()}
CASES = {
    "dense-colwise": Case(_dense, (_X, _Z), Colwise(), (R, R), Shard(-1), {}, BOTH),
    "dense-tokens": Case(_dense, (_T, _Z), Colwise(), (R, R), Shard(-1), {}, BOTH),
    "dense-rowwise": Case(_dense, (_X, _Z), Rowwise(), (Shard(-1), R), R, REDUCE, REDUCE),
    "dense-contexts": Case(_dense, (_X, _Z), Rowwise(axis="Z"), (R, Shard(-1)), R, REDUCE, REDUCE),
    # Rows on the way in and out, as in sequence parallelism.
    "dense-rows": Case(
        _dense,
        (_X, _Z),
        Colwise(input_layouts=(Shard(0), Shard(0))),
        (Shard(0), Shard(0)),
        Shard(-1),
        {"all_gather_into_tensor": 2},
        {"reduce_scatter_tensor": 2},
    ),
    "dense-scatter": Case(
        _dense,
        (_X, _Z),
        Rowwise(output_layouts=Shard(0)),
        (Shard(-1), R),
        Shard(0),
        {"reduce_scatter_tensor": 1},
        {"all_gather_into_tensor": 1, "all_reduce": 1},
    ),
    "bilinear-colwise": Case(
        lambda: mi.nn.Bilinear(6, 3, 5), (_X, _Z), Colwise(), (R, R), Shard(-1), {}, BOTH
    ),
    "bilinear-rowwise": Case(
        lambda: mi.nn.Bilinear(6, 3, 5), (_X, _Z), Rowwise(), (Shard(-1), R), R, REDUCE, REDUCE
    ),
    "converted": Case(
        lambda: mi.convert(nn.Sequential(nn.Bilinear(6, 3, 5)))[0],
        (_X, _Z),
        Colwise(),
        (R, R),
        Shard(-1),
        {},
        BOTH,
    ),
    "biaffine-colwise": Case(_biaffine, (_T, (4, 2, 3)), Colwise(), (R, R), Shard(-1), {}, BOTH),
    "biaffine-rowwise": Case(
        lambda: _biaffine(ones=(False, True), channels_first=True),
        (_T, (4, 2, 3)),
        Rowwise(),
        (Shard(-1), R),
        R,
        REDUCE,
        REDUCE,
    ),
    "hyper-colwise": Case(
        lambda: mi.nn.HyperLinear(6, out_features=5, context_features=3),
        (_T, _Z),
        Colwise(),
        (R, R),
        Shard(-1),
        {},
        BOTH,
    ),
    "gated-colwise": Case(
        lambda: mi.nn.GatedInteraction(6, context_features=3),
        (_X, _Z),
        Colwise(),
        (R, R),
        Shard(-1),
        {},
        # x's gradient is sharded through the product and a partial sum through the gate.
        {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 1, "all_reduce": 1},
    ),
    "diagonal-colwise": Case(
        lambda: mi.nn.DiagonalInteraction(6, context_features=3, activation="sigmoid"),
        (_X, _Z),
        Colwise(input_layouts=Shard(-1)),
        (Shard(-1), R),
        Shard(-1),
        {},
        REDUCE,
    ),
    "film-tokens": Case(
        lambda: _film(-1),
        ((4, 3, 5), _Z),
        Colwise(),
        (R, R),
        Shard(-1),
        {},
        {"all_gather_into_tensor": 1, "all_reduce": 1},
    ),
    "film-maps": Case(
        lambda: _film(1),
        ((4, 5, 2, 3), _Z),
        Colwise(input_layouts=Shard(1)),
        (Shard(1), R),
        Shard(1),
        {},
        REDUCE,
    ),
    "low-rank-colwise": Case(_low_rank, (_X, _Z), Colwise(), (R, R), Shard(-1), {}, BOTH),
    "low-rank-ranks": Case(_low_rank, (_X, _Z), Rowwise(), (R, R), R, REDUCE, BOTH),
    "glu-colwise": Case(lambda: mi.nn.GLU(6, out_features=5), (_T,), Colwise(), (R,), Shard(-1), {}, REDUCE),
    "mlp": Case(lambda: mi.nn.GatedMLP(6, hidden_features=8), (_T,), _MLP, (R,), R, REDUCE, REDUCE),
}


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return module


def check_style(name: str, case: Case, mesh: Any) -> None:
    torch.manual_seed(0)
    alone = randomised(case.module().double())
    # All ranks get the weights of rank 0, whatever they have drawn.
    sharded = copy.deepcopy(alone)
    if mesh.get_local_rank() > 0:
        randomised(sharded)
    torch.manual_seed(1)
    parallelize_module(sharded, mesh, case.plan)
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in case.inputs]
    parts = [
        part(tensor, mesh, place).requires_grad_()
        for tensor, place in zip(inputs, case.placements, strict=True)
    ]
    with CommDebugMode() as forward:
        found = sharded(*parts)
    expected = alone(*inputs)
    result = Shard(case.result.dim % expected.dim()) if case.result.is_shard() else case.result
    equal(found, part(expected, mesh, result), name)
    assert counts(forward) == case.forward, (name, counts(forward))
    grad = torch.randn_like(expected)
    with CommDebugMode() as backward:
        found.backward(part(grad, mesh, result))
    expected.backward(grad)
    assert counts(backward) == case.backward, (name, counts(backward))
    for tensor, own, place in zip(inputs, parts, case.placements, strict=True):
        equal(own.grad, part(tensor.grad, mesh, place), name)
    check_step(name, sharded, alone)


def check_step(name: str, sharded: nn.Module, alone: nn.Module) -> None:
    """The same gradients, and parameters after a step."""
    for (key, one), other in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        equal(whole(one.grad), other.grad, f"{name}: gradient of {key}")
    for module in (sharded, alone):
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9).step()
    for (key, one), other in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        equal(whole(one), other, f"{name}: {key} after a step")


def check_styles(mesh: Any) -> None:
    for name, case in CASES.items():
        check_style(name, case, mesh)
    layer = parallelize_module(_dense(), mesh, Colwise())
    x, z = torch.randn(_X).requires_grad_(), torch.randn(_Z)
    y = layer(x, z=z)
    with CommDebugMode() as mode:
        y.sum().backward()
    assert counts(mode) == REDUCE, counts(mode)  # no gradient of z


class Model(nn.Module):
    """All kinds of modules, one after the other: 3-D weights, packed ones, a context network."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(3, 3)
        self.dense = mi.nn.MultiplicativeInteraction(6, context_features=3, out_features=5)
        self.hyper = mi.nn.HyperLinear(5, out_features=7, context_features=3)
        self.film = mi.nn.FiLM(8, context_features=3, channel_dim=-1)
        self.mlp = mi.nn.GatedMLP(8, hidden_features=5)
        self.low_rank = mi.nn.LowRankInteraction(8, context_features=3, out_features=4, rank=5, weight_z=True)
        self.rnn = mi.nn.MultiplicativeIntegrationGRU(4, hidden_size=3, batch_first=True)
        self.block = mi.nn.AdaLNZeroBlock(
            mi.nn.GatedMLP(3, hidden_features=4), features=3, context_features=3
        )
        self.last = mi.nn.Bilinear(3, 3, 2)

    def forward(self, x: torch.Tensor, z: torch.Tensor, skip: bool = False) -> torch.Tensor:
        z = self.context(z)
        h = self.dense(x, z).tanh()
        if not skip:
            h = h + self.hyper(h, z)[..., :5].tanh()
        h = self.film(torch.cat((h, h[..., :3]), -1), z)
        h = self.low_rank(self.mlp(h), z)
        h = self.rnn(h)[0]
        h = self.block(h, z)
        return self.last(h.mean(1), z)


# By styles: the rest is the same on all devices.
PLAN = {
    "dense": Colwise(output_layouts=R),
    "hyper": Colwise(output_layouts=R),
    "film": Colwise(output_layouts=R),
    "mlp.glu": Colwise(),
    "mlp.down": Rowwise(),
    "low_rank": Rowwise(),
    "block.attn.glu": Colwise(),
    "block.attn.down": Rowwise(),
    "last": Rowwise(axis="X", input_layouts=(R, R)),
}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(Model().double())


def rows(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = [
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((2 * world, 3, 6), (2 * world, 3))
    ]
    return draw[0], draw[1]


def check_data_parallel(name: str, wrapped: nn.Module, rank: int, world: int, skip: bool = False) -> None:
    """Each rank has its rows; the loss is the mean over all."""
    alone = model()
    x, z = rows(world)
    own = slice(2 * rank, 2 * rank + 2)
    wrapped(x[own], z[own], skip).square().mean().backward()
    alone(x, z, skip).square().mean().backward()
    pairs = zip(wrapped.parameters(), alone.named_parameters(), strict=True)
    for one, (key, other) in pairs:
        if other.grad is None:
            assert one.grad is None or whole(one.grad).abs().max() == 0, f"{name}: {key}"
            continue
        equal(whole(one.grad), other.grad, f"{name}: {key}")
    for each in (wrapped, alone):
        torch.optim.AdamW(each.parameters(), lr=0.1).step()
    x, z = x[:2], z[:2]
    equal(wrapped(x, z, skip), alone(x, z, skip), f"{name}: after a step")


def check_ddp(rank: int, world: int) -> None:
    check_data_parallel("ddp", DistributedDataParallel(model()), rank, world)
    unused = DistributedDataParallel(model(), find_unused_parameters=True)
    check_data_parallel("ddp, unused", unused, rank, world, skip=True)
    static = DistributedDataParallel(model(), static_graph=True, gradient_as_bucket_view=True)
    check_data_parallel("ddp, static", static, rank, world)


def fsdp(module: nn.Module, mesh: Any) -> nn.Module:
    options: Any = {"mesh": mesh, "shard_placement_fn": mi.parallel.fsdp_placement}
    for child in module.children():
        fully_shard(child, **options)
    return fully_shard(module, **options)


def check_fsdp(mesh: Any) -> None:
    """3-D weights and packed ones on dimension 0, of sizes that the number of devices does not divide."""
    rank, world = mesh.get_local_rank(), mesh.size()
    check_data_parallel("fsdp", fsdp(model(), mesh), rank, world)


def check_model_by_styles(mesh: Any) -> None:
    sharded, alone = parallelize_module(model(mesh.get_local_rank()), mesh, PLAN), model()
    for (key, one), other in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        if isinstance(one, DTensor):
            equal(one.full_tensor(), other, key)
        else:  # not in the plan
            with torch.no_grad():
                one.copy_(other)
    x, z = rows(mesh.size())
    found, expected = sharded(x, z), alone(x, z)
    equal(found, expected, "model")
    found.square().sum().backward()
    expected.square().sum().backward()
    check_step("model", sharded, alone)


def check_both(mesh: Any) -> None:
    """FSDP2 along one dimension of the mesh, styles along the other."""
    data, tensor = mesh["data"], mesh["tensor"]
    # Without the packed bias of film; and FSDP2 refuses to shard the 3 features of the block's GLU.
    plan = {name: style for name, style in PLAN.items() if not name.startswith(("film", "block"))}
    sharded = fsdp(parallelize_module(model(), tensor, plan), data)
    check_data_parallel("fsdp and styles", sharded, data.get_local_rank(), data.size())
    for name in plan:  # whole tensors, into parameters that are sharded twice
        other = model(5).get_submodule(name)
        styled = sharded.get_submodule(name)
        styled.load_state_dict(other.state_dict())
        for (key, one), expected in zip(styled.named_parameters(), other.parameters(), strict=True):
            equal(one.full_tensor(), expected, f"{name}.{key}")
    with pytest.raises(ValueError, match="^fsdp_placement: parameter: expected at least 2 dimensions"):
        fsdp(parallelize_module(model(), tensor, PLAN), data)
    silent = parallelize_module(mi.nn.GLU(4, out_features=8, bias=False), tensor, Colwise())
    with pytest.raises(RuntimeError, match="GLU: weight: expected one mesh dimension .*fsdp_placement"):
        fully_shard(silent, mesh=data).state_dict()
    whole_weight = {"weight": torch.zeros(16, 4)}
    with pytest.raises(NotImplementedError, match="GLU: weight: expected placements of a style and of"):
        silent.load_state_dict(whole_weight)


def check_two(mesh: Any) -> None:
    """DTensors on a mesh of two dimensions: rows along one, outputs or inputs along the other."""
    torch.manual_seed(3)
    x, z, weight, weight_x, bias = (
        torch.randn(size, dtype=torch.float64).requires_grad_()
        for size in ((5, 3, 6), (5, 1, 3), (7, 3, 6), (7, 6), (7,))
    )
    layouts = {
        "outputs": ((Shard(0), R), (Shard(0), R), (R, Shard(0)), (R, Shard(0)), (R, Shard(0))),
        "inputs": ((Shard(0), Shard(2)), (Shard(0), R), (R, Shard(2)), (R, Shard(1)), (R, R)),
        "rows": ((Shard(0), Shard(1)), (Shard(0), R), (R, R), (R, R), (R, R)),
        "both": ((Shard(1), Shard(1)), (R, R), (R, R), (R, R), (R, R)),
    }
    results = {"outputs": (Shard(0), Shard(2)), "inputs": (Shard(0), Partial())}
    results |= {"rows": (Shard(0), Shard(1)), "both": (Shard(1), Shard(1))}
    tensors = x, z, weight, weight_x, bias

    def call(x, z, weight, weight_x, bias):
        return mi.interaction(x, z, weight, None, weight_x, bias)

    expected = call(*tensors)
    gradients = torch.autograd.grad(expected.sin().sum(), tensors)
    for name, placements in layouts.items():
        leaves = [
            distribute_tensor(tensor.detach(), mesh, placed).requires_grad_()
            for tensor, placed in zip(tensors, placements, strict=True)
        ]
        with CommDebugMode() as mode:
            y = call(*leaves)
        assert y.placements == results[name] and counts(mode) == {}, (name, y.placements, counts(mode))
        equal(y.full_tensor(), expected, name)
        whole_y = y.redistribute(placements=[place if place.is_shard() else R for place in y.placements])
        found = torch.autograd.grad(whole_y.sin().sum(), leaves)
        for one, other in zip(found, gradients, strict=True):
            equal(one.full_tensor(), other, name)


def check_packed_sums(mesh: Any) -> None:
    """A packed weight that is a partial sum along one dimension of the mesh, and sharded along the other."""
    torch.manual_seed(8)
    x, weight = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((4, 6), (10, 6)))
    expected = mi.glu(x, weight)
    gradients = torch.autograd.grad(expected.sin().sum(), (x, weight))
    for kind in ("sum", "avg"):
        for place in (Shard(0), Shard(1), R):
            local = distribute_tensor(weight.detach(), mesh, [R, place]).to_local()
            term = local / mesh.size(0) if kind == "sum" else local
            packed = DTensor.from_local(term, mesh, [Partial(kind), place]).requires_grad_()
            rows_of = distribute_tensor(x.detach(), mesh, [Shard(0), R]).requires_grad_()
            y = mi.glu(rows_of, packed)
            equal(y.full_tensor(), expected, kind)
            found = torch.autograd.grad(y.full_tensor().sin().sum(), (rows_of, packed))
            for one, other in zip(found, gradients, strict=True):
                equal(one.full_tensor(), other, f"{kind} {place}")


def check_compiled(mesh: Any) -> None:
    """torch.compile: calls of DTensors break the graph, elementwise ones are in it; the same values."""
    torch.manual_seed(9)
    ids = torch.tensor([0, 1, 1, 2])
    rows_first = Shard(0)
    calls: dict[str, Any] = {
        "a context for all tokens": (mi.interaction, ((4, 3, 6), (4, 1, 3), (5, 3, 6)), (rows_first,) * 2),
        "layers by segment": (
            lambda *given: mi.apply_generated(*given, segment_ids=ids),
            ((4, 6), (3, 5, 6), (3, 5)),
            (rows_first,),
        ),
        "rows in the middle": (mi.glu, ((3, 4, 6), (10, 6)), (rows_first,)),
        "elementwise": (mi.modulate, ((4, 3, 6), (4, 1, 6)), (rows_first,) * 2),
    }
    for name, (function, shapes, placements) in calls.items():
        tensors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        places = [*placements, *[R] * (len(tensors) - len(placements))]
        leaves = [
            distribute_tensor(one.detach(), mesh, [place]).requires_grad_()
            for one, place in zip(tensors, places, strict=True)
        ]
        whole = name == "elementwise"
        compiled = torch.compile(function, backend="aot_eager" if whole else "eager", fullgraph=whole)
        y, expected = compiled(*leaves), function(*tensors)
        equal(y.full_tensor(), expected, name)
        found = torch.autograd.grad(y.full_tensor().sin().sum(), leaves)
        for one, other in zip(found, torch.autograd.grad(expected.sin().sum(), tensors), strict=True):
            equal(one.full_tensor(), other, name)
    whole_graph = torch.compile(mi.interaction, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="mi_kernels runs this call of DTensors on their parts"):
        whole_graph(
            *(distribute_tensor(torch.randn(size), mesh, [R]) for size in ((4, 6), (4, 3), (5, 3, 6)))
        )
    tokens, z = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for make, plan, given in (
        (lambda: mi.nn.GatedMLP(6, hidden_features=5), _MLP, (tokens,)),
        (_dense, Colwise(output_layouts=R), (tokens, z)),
    ):
        alone = make().double()
        sharded = parallelize_module(copy.deepcopy(alone), mesh, plan)
        found, expected = torch.compile(sharded, backend="aot_eager")(*given), alone(*given)
        equal(found, expected, "styles")
        found.square().sum().backward()
        expected.square().sum().backward()
        check_step("styles", sharded, alone)


def check_state(mesh: Any) -> None:
    """State dicts of sharded modules: their shapes are those of one process, and they load each other's."""
    alone, sharded = model(5), parallelize_module(model(), mesh, PLAN)
    sharded.load_state_dict(alone.state_dict())
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for key, value in alone.state_dict().items():
        equal(full[key], value, key)
    other = parallelize_module(model(), mesh, PLAN)
    other.load_state_dict(sharded.state_dict())
    x, z = rows(mesh.size())
    equal(other(x, z), alone(x, z), "loaded")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.last.load_state_dict({"weight": torch.zeros(2, 3, 4), "bias": torch.zeros(2)})


def check_meta(mesh: Any) -> None:
    """From the meta device: parallelize, to_empty, load or draw."""
    alone = model(6)
    with torch.device("meta"):
        sharded = Model().double()
    parallelize_module(sharded, mesh, PLAN)
    assert all(parameter.is_meta for parameter in sharded.parameters())
    sharded.to_empty(device="cpu")
    sharded.load_state_dict(alone.state_dict())
    x, z = rows(mesh.size())
    equal(sharded(x, z), alone(x, z), "meta")
    sharded.dense.reset_parameters()
    bound = (3 / (3 * 18)) ** 0.5
    assert 0 < sharded.dense.weight.full_tensor().abs().max() <= bound


def check_orders(mesh: Any) -> None:
    """A gradient penalty through a style with plain inputs and outputs."""
    torch.manual_seed(4)
    first = randomised(_dense().double())
    for style, place in ((Colwise(output_layouts=R), R), (Rowwise(), Shard(-1))):
        alone = copy.deepcopy(first)
        sharded = parallelize_module(copy.deepcopy(alone), mesh, style)
        x, z = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in (_X, _Z))
        own = part(x, mesh, place).requires_grad_()
        penalties = []
        for module, given in ((sharded, own), (alone, x)):
            (slope,) = torch.autograd.grad(module(given, z).sin().sum(), given, create_graph=True)
            penalties.append(slope.square().sum())
            penalties[-1].backward()
        equal(own.grad, part(x.grad, mesh, place), "slope")
        check_step("penalty", sharded, alone)


def check_errors(mesh: Any) -> None:
    def refused(module: nn.Module, style: Any, error: Any, text: str, mesh: Any = mesh) -> None:
        """Before anything is sharded: the module is as it was."""
        before = {name: type(parameter) for name, parameter in module.named_parameters()}
        hooks = [len(child._forward_hooks) for child in module.modules()]
        with pytest.raises(error, match=text):
            parallelize_module(module, mesh, style)
        assert {name: type(parameter) for name, parameter in module.named_parameters()} == before
        assert [len(child._forward_hooks) for child in module.modules()] == hooks

    refused(
        mi.nn.GatedMLP(4, hidden_features=8),
        Colwise(),
        NotImplementedError,
        r"^Colwise: .* got GatedMLP; it has glu",
    )
    refused(nn.Conv1d(1, 1, 1), Colwise(), NotImplementedError, "^Colwise: expected a module .* got Conv1d$")
    gated = mi.nn.GatedInteraction(4, context_features=3)
    refused(
        gated, Rowwise(), NotImplementedError, "^Rowwise: GatedInteraction: expected an axis of none.* 'X'$"
    )
    refused(
        mi.nn.Biaffine(4, 3, 2),
        Rowwise(),
        NotImplementedError,
        "^Rowwise: Biaffine: expected an axis of none",
    )
    refused(_dense(), Rowwise(axis="R"), NotImplementedError, "expected an axis of X, Z, got 'R'$")
    softmax = mi.nn.GLU(4, out_features=8, activation="softmax")
    refused(softmax, Colwise(), NotImplementedError, "^GLU: expected an elementwise activation")
    tucker = mi.nn.LowRankInteraction(4, context_features=3, out_features=2, rank=2, core="tucker")
    refused(tucker, Colwise(), NotImplementedError, "^LowRankInteraction: expected core")
    layouts = Colwise(input_layouts=(R, R, R))
    refused(
        _dense(),
        layouts,
        ValueError,
        "^Colwise: MultiplicativeInteraction: input_layouts: expected layouts of at most 2 inputs, got 3$",
    )
    head = mi.nn.HyperLinear.from_linear(nn.Linear(3, 20), 4, 4)
    refused(
        head,
        Colwise(),
        NotImplementedError,
        r"^Colwise: HyperLinearHead: weight: expected a parameter \[O, Z, X\] of its own, got",
    )
    once = parallelize_module(_dense(), mesh, Colwise())
    refused(
        once,
        Colwise(),
        ValueError,
        "^Colwise: MultiplicativeInteraction: weight: expected a parameter that is not sharded yet, got a",
    )
    grid = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "tensor"))
    of_one = "^Colwise: MultiplicativeInteraction: device_mesh: expected a mesh of one dimension, got 2"
    refused(_dense(), Colwise(), ValueError, of_one, grid)
    own = r"^Rowwise: .*{}: weight: expected a parameter \[{}\] of its own, got a tensor that is no par"
    computed = "^Colwise: {}: {}: expected a parameter, got a tensor that others are made into: remove the"
    for make, kind, letters in (
        (lambda: mi.nn.Bilinear(6, 3, 5), "Bilinear", "O, X, Z"),
        (lambda: nn.Linear(6, 5), "Linear", "O, X"),
    ):
        for change in (parametrizations.weight_norm, prune.random_unstructured):
            options = {} if change is parametrizations.weight_norm else {"amount": 0.5}
            changed = make()
            change(changed, "weight", **options)
            refused(changed, Rowwise(), NotImplementedError, own.format(kind, letters))
    film = mi.nn.FiLM(6, context_features=3)
    parametrizations.weight_norm(film, "weight")
    refused(film, Colwise(), NotImplementedError, "FiLM: weight: expected a parameter .C, Z. of its own")
    inside = _hyper_with_network()
    prune.random_unstructured(inside.context_network, "weight", 0.5)
    refused(
        inside, Colwise(), NotImplementedError, computed.format("HyperLinear", r"context_network\.weight")
    )
    network = _hyper_with_network()
    parametrizations.weight_norm(network.context_network)
    refused(
        network, Colwise(), NotImplementedError, computed.format("HyperLinear", r"context_network\.weight")
    )
    given = torch.randn(4, 6), torch.randn(4, 3)
    far = parallelize_module(_dense(), mesh, Colwise(input_layouts=(R, Shard(2))))
    with pytest.raises(
        ValueError, match=r"^Colwise: .*Interaction: z: expected a layout along one of 2 .*\(2\)$"
    ):
        far(*given)
    far = parallelize_module(_dense(), mesh, Colwise(output_layouts=Shard(7)))
    with pytest.raises(
        ValueError, match=r"^Colwise: .*: the result: expected a layout along one of 2 .*\(7\)$"
    ):
        far(*given)
    with pytest.raises(ValueError, match="^Colwise: .*: x: expected a DTensor of .*, got one of"):
        once(distribute_tensor(given[0], grid, [R, R]), given[1])
    with pytest.raises(ValueError, match="^Rowwise: axis: expected one of X, Z, R, got 'O'$"):
        Rowwise(axis="O")
    for argument, layout, kind in (
        ("output_layouts", 0, "int"),
        ("input_layouts", (None, R), "NoneType"),
        ("input_layouts", 0, "int"),
        ("input_layouts", "R", "str"),
    ):
        text = f"^Colwise: {argument}: expected layouts that are placements, got {kind}$"
        with pytest.raises(TypeError, match=text):
            Colwise(**{argument: layout})  # type: ignore[arg-type]
    x, weight = (distribute_tensor(torch.randn(size), mesh, [R]) for size in ((4, 6), (5, 3, 6)))
    with pytest.raises(TypeError, match="^interaction: z: expected a DTensor, as other arguments are"):
        mi.interaction(x, torch.randn(4, 3), weight)
    with pytest.raises(TypeError, match="^glu: weight: expected a DTensor"):
        mi.glu(x, torch.randn(8, 6))
    plain = torch.randn(4, 6)
    for call in (
        lambda: mi.interaction(plain, torch.randn(4, 3), weight),
        lambda: mi.glu(plain, x),
        lambda: mi.mix(plain, plain, x),
        lambda: mi.norm_modulate(x, plain),
    ):
        with pytest.raises(TypeError, match="^mi_kernels: expected DTensors for all tensors of a call or"):
            call()
    with pytest.raises(TypeError, match="^gated_interaction: weight: expected a DTensor"):
        mi.gated_interaction(x, distribute_tensor(torch.randn(4, 3), mesh, [R]), torch.randn(6, 3, 6))


def check_other_calls(mesh: Any) -> None:
    """What needs collectives, or has another way: the values and gradients of one process."""
    torch.manual_seed(7)
    columns, rows_first = Shard(0), Shard(0)
    ids = torch.tensor([1, 0, 1, 2])

    def gated(x, z, weight, weight_x, shift):
        return mi.diagonal(x, z, weight, None, shift, None, weight_x=weight_x, activation="sigmoid")

    def packed(x, weight, bias):
        return mi.glu(x, weight, bias, gate_first=False)

    def by_segment(x, z, weight):
        given = distribute_tensor(ids, mesh, [rows_first]) if isinstance(x, DTensor) else ids
        return mi.interaction(x, z, weight, segment_ids=given)

    calls: dict[str, Any] = {
        "diagonal with G": (
            gated,
            ((4, 6), (4, 3), (6, 3), (6, 6), (6, 3)),
            (R, R, columns, columns, columns),
        ),
        "softmax": (
            lambda *given: mi.gated_interaction(*given, activation="softmax"),
            ((4, 6), (4, 3), (6, 3, 6)),
            (R, R, columns),
        ),
        "halves in one part each": (packed, ((4, 6), (10, 6), (10,)), (R, Shard(0), Shard(0))),
        "whole halves": (packed, ((4, 6), (10, 6), (10,)), (Shard(0), R, R)),
        "channels of a norm": (mi.norm_modulate, ((4, 3, 6), (4, 1, 6)), (Shard(2), Shard(2))),
        "units": (
            lambda *given: mi.multiplicative_rnn("mi_gru", given[0], None, *given[1:])[0],
            ((3, 4, 6), (15, 6), (15, 5)),
            (R, Shard(0), Shard(0)),
        ),
        "indices": (by_segment, ((4, 6), (3, 3), (5, 3, 6)), (rows_first, R, R)),
        "rows and outputs": (mi.interaction, ((4, 6), (4, 3), (5, 3, 6)), (rows_first, rows_first, columns)),
        "one row for all, modulated": (mi.modulate, ((1, 6), (4, 6)), (rows_first, rows_first)),
        "one row for all, mixed": (mi.mix, ((4, 6), (1, 6), (4, 6)), (rows_first, rows_first, R)),
        "one sample for all, normalised": (
            mi.norm_modulate,
            ((4, 3, 6), (1, 3, 6), (4, 1, 6)),
            (rows_first, rows_first, R),
        ),
        "sums": (mi.interaction, ((4, 6), (4, 3), (5, 3, 6)), (Shard(1), Shard(1), columns)),
    }
    for name, (function, shapes, placements) in calls.items():
        tensors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
        leaves = [
            distribute_tensor(tensor.detach(), mesh, [place]).requires_grad_()
            for tensor, place in zip(tensors, placements, strict=True)
        ]
        y, expected = function(*leaves), function(*tensors)
        equal(y.full_tensor(), expected, name)
        found = torch.autograd.grad(y.full_tensor().sin().sum(), leaves)
        for one, other in zip(found, torch.autograd.grad(expected.sin().sum(), tensors), strict=True):
            equal(one.full_tensor(), other, name)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 6), (4, 3), (5, 3, 6))]
    parts = [distribute_tensor(tensor, mesh, [R]) for tensor in tensors]
    equal(
        mi.interaction(parts[0], parts[1], mi.pack(parts[2])).full_tensor(),
        mi.interaction(*tensors),
        "packed",
    )
