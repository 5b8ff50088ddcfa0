"""DTensor: every call on replicated tensors, and on rows and groups that are sharded, in two processes.

Every cut of the registered operations; every layout of layouts.py, and modules by styles, DDP and FSDP2
(parallel_modules.py), in two and four.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import parallel_modules as modules
import pytest
import torch
import torch.multiprocessing as processes
from calls import CALLS
from layouts import check_layouts
from parallel_operations import check_operations
from torch import distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import mi_kernels as mi
from mi_kernels.ops.library import DEFINED, twins

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "distributed.md"
RECURRENT = ("mlstm", "mi-gru", "second-order")  # whose rows are their second dimension: layouts.py


def distributed_leaf(tensor, mesh, placement):
    return distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_()


def agrees(call, tensors, placements, mesh):
    """The same values and gradients as without DTensor; returns where y lies."""
    leaves = [
        distributed_leaf(*pair) for pair in zip(tensors, [mesh] * len(tensors), placements, strict=True)
    ]
    y, expected = call(*leaves), call(*tensors)
    gradients = torch.autograd.grad(y.sin().sum(), leaves)
    torch.testing.assert_close(y.full_tensor(), expected)
    found = tuple(gradient.full_tensor() for gradient in gradients)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), tensors))
    return y.placements, gradients


def check_calls(mesh):
    for name, call in CALLS.items():
        tensors = call.arguments(torch.float64)
        where, _ = agrees(call, tensors, [Replicate()] * len(tensors), mesh)
        assert where == (Replicate(),), name
        if name in RECURRENT:
            continue
        # Rows of x and of the contexts; of modulation what has them.
        rows = len(tensors[0])
        sharded = [Shard(0) if k < 2 and len(t) == rows else Replicate() for k, t in enumerate(tensors)]
        where, gradients = agrees(call, tensors, sharded, mesh)
        assert where == (Shard(0),), name
        if name in ("interaction", "gated", "diagonal"):
            assert gradients[2].placements == (Partial(),), name


def check_modulation_along_features(mesh):
    tensors = [torch.randn(sizes, dtype=torch.float64).requires_grad_() for sizes in ((3, 4, 6), (3, 1, 6))]
    where, _ = agrees(mi.modulate, tensors, [Shard(2), Shard(2)], mesh)
    assert where == (Shard(2),)
    where, _ = agrees(mi.modulate, tensors, [Shard(1), Replicate()], mesh)
    assert where == (Shard(1),)


def check_groups(mesh):
    """A layer for each group, on the device of the group."""
    x, weight = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 5, 3), (4, 1, 2, 3)))
    where, gradients = agrees(mi.apply_generated, [x, weight], [Shard(0), Shard(0)], mesh)
    assert where == gradients[1].placements == (Shard(0),)


def check_guide():
    """The blocks of docs/guides/distributed.md, which are one program for two processes."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 4
    exec(compile("\n".join(blocks), str(GUIDE), "exec"), {"__name__": "guide"})


def check_all(rank, world, store):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # on results that are views
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        torch.manual_seed(0)
        if world == 2:
            check_calls(mesh)
            check_modulation_along_features(mesh)
            check_groups(mesh)
            check_operations(mesh)
            modules.check_errors(mesh)
            modules.check_meta(mesh)
            modules.check_compiled(mesh)
            check_guide()
        else:
            both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
            modules.check_both(both)
            modules.check_two(both)
            modules.check_packed_sums(both)
        check_layouts(mesh, second=world == 2)
        modules.check_styles(mesh)
        modules.check_model_by_styles(mesh)
        modules.check_ddp(rank, world)
        modules.check_fsdp(mesh)
        modules.check_state(mesh)
        modules.check_orders(mesh)
        modules.check_other_calls(mesh)
    finally:
        distributed.destroy_process_group()
    # DTensor's caches keep the group, and with it gloo's threads: one that drops its last tensor while Python
    # shuts down aborts the process ("terminate called without an active exception").
    os._exit(0)


@pytest.mark.subprocess
@pytest.mark.parametrize("world", [2, 4])
def test_values_and_gradients(world, tmp_path):
    processes.spawn(check_all, (world, tmp_path / "store"), nprocs=world)


@pytest.mark.subprocess
def test_styles_are_imported_by_their_first_use():
    lines = (
        "import sys, mi_kernels as mi",
        "assert 'torch.distributed.tensor' not in sys.modules and 'Colwise' in dir(mi.parallel)",
        "mi.parallel.Colwise()",
        "assert 'torch.distributed.tensor' in sys.modules and not hasattr(mi.parallel, 'Nothing')",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300)


def test_every_operation_has_a_rule():
    known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    for name in DEFINED:
        assert all(operation in known for operation in twins(name))
