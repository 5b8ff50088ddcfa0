"""How a module calls the public functions: as they are, or told apart for :func:`mi_kernels.explain`."""

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
    """``function(*arguments)``, of a module's forward; while the module is explained, its plan instead."""
    if torch.compiler.is_compiling() or _recording.instead is None:
        return function(*arguments, **keywords)
    return _recording.instead(function, *arguments, **keywords)


@contextmanager
def instead_of_calls(instead: Callable[..., Any] | None) -> Iterator[None]:
    before, _recording.instead = _recording.instead, instead
    try:
        yield
    finally:
        _recording.instead = before
