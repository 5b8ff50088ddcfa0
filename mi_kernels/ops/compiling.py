"""What Dynamo is told of functions, without importing it: that takes as long as importing torch."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_compiling(function: F) -> F:
    """Dynamo calls the function instead of tracing it, as ``torch.compiler.assume_constant_result`` says."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque_while_compiling(function: F) -> tuple[F, Callable[[], None]]:
    """The function as a call in Dynamo's graph (``torch.compiler.allow_in_graph``), and what sees to that.

    The second result is to be called before the first one, where only a compiler comes.
    """

    def opaque(*arguments):
        return function(*arguments)

    @constant_while_compiling
    def admit() -> None:
        torch._dynamo.allow_in_graph(opaque)

    return opaque, admit  # type: ignore[return-value]


@constant_while_compiling
def is_transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()
