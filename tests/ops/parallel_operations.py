"""The sharding rules of the registered operations: each cut of each, by direct calls."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from mi_kernels.ops.library import DEFINED, twins
from mi_kernels.parallel import sharding
from mi_kernels.testing import direct


def _placed(tensor: Any, placement: Any, mesh: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if placement.is_partial():
        return DTensor.from_local(tensor / mesh.size(), mesh, [placement], run_check=False)
    return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)


def _is_small(tensor: Any, placement: Any, mesh: Any) -> bool:
    """Whether PyTorch refuses to shard it: a dimension that is smaller than the number of devices."""
    if not isinstance(tensor, torch.Tensor) or not placement.is_shard():
        return False
    return tensor.shape[placement.dim] < mesh.size()


def check_operation(name: str, arguments: tuple[Any, ...], mesh: Any) -> list[str]:
    """Every cut has the results of one device, where the rule says, without a collective. The cuts."""
    operation = twins(name)[0]
    names = [argument.name for argument in operation._schema.arguments]
    whole = [_placed(value, Replicate(), mesh) for value in arguments]
    rule = sharding._rule(DEFINED[name])
    expected = operation(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = []
    for results, inputs in rule(dict(zip(names, whole, strict=True))):
        pairs = list(zip(arguments, inputs, strict=True))
        if any(_is_small(*pair, mesh) for pair in pairs):
            continue
        given = [_placed(*pair, mesh) for pair in pairs]
        with CommDebugMode() as mode:
            y = operation(*given)
        what = f"{name} {inputs}"
        assert mode.get_total_counts() == 0, what
        y = y if isinstance(y, tuple) else (y,)
        for one, other, place in zip(y, expected, results, strict=True):
            assert one.placements == (place,), what
            torch.testing.assert_close(
                one.full_tensor(),
                other,
                rtol=1e-12,
                atol=1e-12,
                msg=lambda text, what=what: f"{what}: {text}",
            )
        found.append(str(inputs))
    return found


def check_operations(mesh: Any) -> None:
    for name in DEFINED:
        torch.manual_seed(0)
        cuts = set()
        for arguments in direct.GOOD[name]():
            cuts |= set(check_operation(name, arguments, mesh))
        assert len(cuts) > 1, f"{name}: nothing was cut"
