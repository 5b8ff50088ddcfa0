"""Calls of the public functions by modules, which :func:`mi_kernels.explain` can intercept."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class _Recording(threading.local):
    def __init__(self) -> None:
        self.instead: Callable[..., Any] | None = None


_recording = _Recording()


def call(function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
    """``function(*arguments)`` in a module's forward; inside `instead_of_calls` the replacement is called."""
    if torch.compiler.is_compiling() or _recording.instead is None:
        return function(*arguments, **keywords)
    return _recording.instead(function, *arguments, **keywords)


@contextmanager
def instead_of_calls(instead: Callable[..., Any] | None) -> Iterator[None]:
    """Calls ``instead(function, *arguments)`` for every `call` of this thread in the block."""
    before, _recording.instead = _recording.instead, instead
    try:
        yield
    finally:
        _recording.instead = before
