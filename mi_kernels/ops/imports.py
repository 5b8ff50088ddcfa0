"""What this package adds to modules of PyTorch that are slow to import, once somebody else imports them."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

_pending: dict[str, Callable[[], None]] = {}


class _Finder(MetaPathFinder):
    """Finds nothing itself: it has a module that others find run its callback after it has been executed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        callback = _pending.pop(name, None)
        spec = importlib.util.find_spec(name) if callback is not None else None
        if callback is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            callback()

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Calls ``callback`` after the first import of a module, now if that has been."""
    if name in sys.modules:
        callback()
        return
    if not _pending:
        sys.meta_path.insert(0, _Finder())
    _pending[name] = callback
