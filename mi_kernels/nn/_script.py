"""Why torch.jit.script takes no module of this package: asked before it reads the source."""

from typing import Any

from torch import nn


def refuse(module: nn.Module) -> Any:
    """``__prepare_scriptable__``, which torch.jit.script calls on a model and all that is in it."""
    raise TypeError(
        f"{type(module).__name__}: torch.jit.script is not supported, as TorchScript has not the checks of"
        " arguments: use torch.jit.trace, torch.export or torch.compile"
    )
