"""Tensors on the devices of a mesh: ``torch.distributed.tensor`` and its ``parallelize_module``.

Every public function takes DTensors (docs/guides/distributed.md). :class:`Colwise` and :class:`Rowwise` shard
the modules of :mod:`mi_kernels.nn` for tensor parallelism:

    >>> # parallelize_module(model, mesh, {"glu": mi.parallel.Colwise(), "down": mi.parallel.Rowwise()})

Importing this package does not import ``torch.distributed.tensor``; the first use of a style does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .styles import Colwise, Rowwise, fsdp_placement

__all__ = ["Colwise", "Rowwise", "fsdp_placement"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import styles

        return getattr(styles, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
