"""What mi.convert did to the layers of a model, or would do: data and text."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

Status = Literal["converted", "left", "convertible"]
_WORDS: dict[Status, str] = {"converted": "converted", "left": "left alone", "convertible": "convertible"}


@dataclass(frozen=True)
class LayerReport:
    """One layer in a :class:`mi_kernels.ConversionReport`.

    Attributes:
        path: its name, as :meth:`torch.nn.Module.get_submodule` takes it; empty for the model itself.
        before: its class, or what that was before it was converted.
        status: ``"converted"``, ``"left"`` (alone) or ``"convertible"``: convert would convert it.
        now: its class as it is.
        reason: why it was left alone, else empty.
    """

    path: str
    before: str
    status: Status
    now: str
    reason: str = ""

    def __str__(self) -> str:
        said = {
            "converted": f"converted: {self.now}",
            "left": f"left alone: {self.reason}",
            "convertible": "convertible: mi.convert would convert it",
        }[self.status]
        return said + (f" ({self.reason})" if self.reason and self.status != "left" else "")


@dataclass(frozen=True)
class ConversionReport:
    """The layers of a model that :func:`mi_kernels.convert` concerns: what :func:`conversion_report` returns.

    A sequence of its ``entries``; ``str`` of it is a table. An empty one (``not report``) found nothing.

    Attributes:
        model: the class of the model.
        looked_for: the classes that were looked for.
        entries: a tuple with the ``path``, ``before``, ``status``, ``now`` and ``reason`` of each layer.

    Example:
        >>> report = mi.conversion_report(torch.nn.Sequential(torch.nn.Linear(3, 4)))
        >>> len(report), report.looked_for
        (0, ('nn.Bilinear',))
    """

    model: str
    looked_for: tuple[str, ...]
    entries: tuple[LayerReport, ...]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.entries)

    def __getitem__(self, index: int) -> LayerReport:
        return self.entries[index]

    def of(self, status: Status) -> tuple[LayerReport, ...]:
        """The entries of one status.

        Example:
            >>> mi.conversion_report(torch.nn.Bilinear(3, 4, 2)).of("convertible")[0].before
            'nn.Bilinear'
        """
        return tuple(entry for entry in self.entries if entry.status == status)

    def __str__(self) -> str:
        if not self.entries:
            return f"{self.model}: {nothing(self.looked_for)}"
        counts = Counter(entry.status for entry in self.entries)
        sums = ", ".join(f"{counts[status]} {word}" for status, word in _WORDS.items() if counts[status])
        rows = [(entry.path or "(the model)", entry.before, str(entry)) for entry in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"  {path:{widths[0]}}  {before:{widths[1]}}  {said}" for path, before, said in rows]
        return "\n".join([f"{self.model}: {sums}", *lines])


def nothing(looked_for: Iterable[str]) -> str:
    return (
        f"found nothing to convert: no {', no '.join(looked_for)}"
        " (rules= takes your own layers, mi.nn.rules has those of other packages)"
    )


def label(cls: type) -> str:
    """A class as one would write it: nn.Bilinear, mi.nn.Bilinear, NNConv."""
    from .. import nn as ours  # which imports this module

    for name, package in ("nn", nn), ("mi.nn", ours):
        if getattr(package, cls.__name__, None) is cls:
            return f"{name}.{cls.__name__}"
    return cls.__qualname__


def counted(names: Iterable[str]) -> str:
    """The names with how often each stands there: 2 nn.Bilinear, 1 NNConv."""
    return ", ".join(f"{number} {name}" for name, number in Counter(names).items())
