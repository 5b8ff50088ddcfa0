"""What a module says of the axes of its parameters, for the styles that shard them."""

from collections.abc import Mapping
from typing import NamedTuple


class ModuleAxes(NamedTuple):
    """The feature axes of the inputs and of the result of a module, and all axes of its parameters.

    The result may be sharded along its own axis, or be a partial sum over one of ``summed``. ``packed``
    parameters are two tensors, one behind the other along their first dimension.
    """

    inputs: tuple[str, ...]
    result: str
    parameters: Mapping[str, str]
    summed: str = ""
    packed: tuple[str, ...] = ()
    dims: tuple[int, ...] = (-1, -1)  # where the features of the inputs are
    result_dim: int = -1
