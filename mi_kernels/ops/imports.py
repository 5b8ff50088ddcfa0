"""What this package adds to modules of PyTorch that are slow to import, once somebody else imports them."""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

_callbacks: dict[str, Callable[[], None]] = {}


class _Finder(MetaPathFinder):
    """Finds nothing itself: it has a module that others find run its callback after it has been executed."""

    def __init__(self) -> None:
        self._asking: set[str] = set()  # the others, for these

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        callback = _callbacks.get(name)
        if callback is None or name in self._asking:
            return None
        self._asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.remove(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            try:
                callback()
            except Exception as error:  # not a reason for the import of another package to fail
                warnings.warn(f"mi_kernels could not add to {name}: {error!r}", RuntimeWarning, stacklevel=2)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Calls ``callback`` after the first import of a module, now if that has been."""
    if name in sys.modules:
        callback()
        return
    if not _callbacks:
        sys.meta_path.insert(0, _Finder())
    _callbacks[name] = callback
