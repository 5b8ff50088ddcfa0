"""Dynamo annotations of functions without importing Dynamo, which takes as long as importing torch."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_compiling(function: F) -> F:
    """``torch.compiler.assume_constant_result``: Dynamo calls the function instead of tracing it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque_while_compiling(function: F) -> tuple[F, Callable[[], None]]:
    """``torch.compiler.allow_in_graph``, registered lazily: (the opaque function, its registration).

    While compiling, call the second result before the first one.
    """

    def opaque(*arguments):
        return function(*arguments)

    @constant_while_compiling
    def admit() -> None:
        torch._dynamo.allow_in_graph(opaque)

    return opaque, admit  # type: ignore[return-value]


@constant_while_compiling
def is_transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active()


@constant_while_compiling  # Dynamo of PyTorch 2.11 takes the query for True whatever it compiles for
def is_exporting() -> bool:
    """Whether a program is exported: ``torch.compiler.is_exporting``."""
    return torch.compiler.is_exporting()
