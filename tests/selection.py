"""Short selections of the tests of every backend, by MI_KERNELS_TEST_SELECTION: "gpu" for minutes on a GPU,
"fast" for the inner loop (`make test-fast`), "all" for every test. Without it only the portable path is
thinned.

Most of the time on a GPU goes into compiling kernels, nearly all of them for products of parameters: each
sample in each dtype. The portable path is PyTorch's products: no kernel of ours differs by size or dtype.
Of each test function and place that is thinned this keeps

* every value of every parameter, where samples count by their fields: every shape, choice of terms, layout;
* every pair of words of which there are few: dtype and layout, dtype and activation, form and plan.

On a GPU, tests that do not take a place, which run without one, are left out, and those of ``HOST``; the
inner loop has them all. A new test, value or parameter needs nothing here.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

import torch

from mi_kernels.testing.biaffine_samples import Pairs
from mi_kernels.testing.dual_samples import DualSample
from mi_kernels.testing.low_rank_weight_samples import Factors
from mi_kernels.testing.recurrent_samples import Recurrence
from mi_kernels.testing.samples import GateSample, Modulation, Sample
from mi_kernels.testing.third_order_samples import Triple

# By words in their names, tests of what all backends share, or of what there is on the CPU alone: the rules
# of derivation in float64, by hundreds of launches each (other tests compare values to the third order), and
# the number of threads.
HOST = ("gradcheck", "vmap", "functional_transforms", "threads_change")
PAIRED = ("layout", "op", "kind")  # fields of samples whose pairs count
FEW = 9  # words of a kind, whose pairs with others are all kept: there are nine activations
SAMPLES = Sample | Modulation | GateSample | Pairs | Factors | Triple | DualSample | Recurrence
Features = Mapping[str, Hashable]


def features_of(parameters: Mapping[str, object]) -> dict[str, Hashable]:
    """Values by name: words are text and dtypes; all else is put as what it is printed as, in a tuple."""
    found: dict[str, Hashable] = {}
    for name, value in parameters.items():
        if isinstance(value, SAMPLES):
            own = {field.name: getattr(value, field.name) for field in fields(value)}
            found |= {f"{name}.{key}": v if key in PAIRED else (str(v),) for key, v in own.items()}
        else:
            found[name] = value if isinstance(value, str | torch.dtype) else (str(value),)
    return found


def cover(cases: Sequence[Features]) -> list[int]:
    """Which of the cases to keep, in their order: one after the other, that which adds most."""
    values: dict[str, set[Hashable]] = {}
    for case in cases:
        for name, value in case.items():
            values.setdefault(name, set()).add(value)
    few = {name for name, found in values.items() if 1 < len(found) <= FEW}
    wanted = [frozenset(_requirements(case, few)) for case in cases]
    missing, used = frozenset().union(*wanted), Counter[Hashable]()
    kept: list[int] = []
    while missing:
        # Of those that add as much, the one whose values came least often: the dtypes take turns.
        best = max(
            (index for index in range(len(cases)) if wanted[index] & missing),
            key=lambda i: (len(wanted[i] & missing), -sum(used[item] for item in cases[i].items()), -i),
        )
        kept.append(best)
        missing -= wanted[best]
        used.update(cases[best].items())
    return sorted(kept)


def _requirements(case: Features, few: set[str]) -> Iterable[Hashable]:
    yield from case.items()
    words = [item for item in case.items() if item[0] in few and isinstance(item[1], str | torch.dtype)]
    yield from combinations(words, 2)


def thinned(items: Sequence[Any], selection: str | None) -> tuple[list[Any], list[Any]]:
    """pytest's items that are kept, in their order, and the others, by the name of a selection."""
    groups: dict[Hashable, list[int]] = {}
    kept: set[int] = set()
    for index, item in enumerate(items):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        place = parameters.get("place")
        of_host = any(word in f"{item.path.name} {item.originalname}" for word in HOST)
        if selection == "gpu" and (place is None or of_host):
            continue
        if place is None or (selection is None and str(place) != "portable"):
            kept.add(index)
        else:
            groups.setdefault((item.path, item.originalname, place), []).append(index)
    for group in groups.values():
        kept |= {group[index] for index in cover([features_of(items[i].callspec.params) for i in group])}
    found: tuple[list[Any], list[Any]] = [], []
    for index, item in enumerate(items):
        found[index not in kept].append(item)
    return found
