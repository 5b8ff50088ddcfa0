"""Callbacks after the import of modules of PyTorch that this package must not import itself (slow)."""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

_callbacks: dict[str, Callable[[], None]] = {}


class _Finder(MetaPathFinder):
    """Finds no modules itself; wraps the loader that other finders return, to run a callback after it."""

    def __init__(self) -> None:
        self._in_progress: set[str] = set()  # names being looked up through the other finders

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        callback = _callbacks.get(name)
        if callback is None or name in self._in_progress:
            return None
        self._in_progress.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._in_progress.remove(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            try:
                callback()
            except Exception as error:  # must not break the import of another package
                warnings.warn(f"mi_kernels could not add to {name}: {error!r}", RuntimeWarning, stacklevel=2)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` after the first import of a module; at once if it is already imported."""
    if name in sys.modules:
        callback()
        return
    if not _callbacks:
        sys.meta_path.insert(0, _Finder())
    _callbacks[name] = callback
