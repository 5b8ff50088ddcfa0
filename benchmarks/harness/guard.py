"""Whether this working tree is slower than another revision: the judgement of `make guard`, and its page.

A case is suspicious if it is slower by more than the threshold and no sample of this tree is as fast as any
of the revision. A suspicious case is measured again, in new processes, and is a regression only if it is
suspicious each time: what lies where in memory differs from process to process.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.measure import Entry
from benchmarks.harness.tables import text_table

# Of the 321 candidates in benchmarks/results (November 2026, a shared machine) three in four have an
# interquartile range of at most 8 % of their median. The ratio of two medians of 7 samples then has a
# standard error of 4 %, and this is twice that.
THRESHOLD = 0.08
AGAIN = 2  # more measurements of a suspicious case
Measurement = dict[str, Any]  # of base.compare
Measure = Callable[[Sequence[Any]], Iterable[Measurement]]


class Verdict(NamedTuple):
    case: Any
    runs: list[Measurement]
    kind: str  # "regression", "faster", "same" or "not measured"

    @property
    def ratios(self) -> list[float]:
        return [run["base_over_head"] for run in self.runs if "failed" not in run]

    @property
    def is_missing(self) -> bool:
        """Never measured because the base does not have it, which is no failure."""
        return self.runs[0].get("failed") == "base" and self.runs[0].get("missing", False)


def is_suspicious(run: Measurement, threshold: float) -> bool:
    """Slower by more than the threshold, and in every sample."""
    if run["base_over_head"] >= 1 - threshold:
        return False
    return min(run["head"]["samples_s"]) > max(run["base"]["samples_s"])


def is_faster(run: Measurement, threshold: float) -> bool:
    if run["base_over_head"] <= 1 / (1 - threshold):
        return False
    return max(run["head"]["samples_s"]) < min(run["base"]["samples_s"])


def judge(
    cases: Sequence[Any], measure: Measure, threshold: float = THRESHOLD, again: int = AGAIN
) -> list[Verdict]:
    """The verdict on each case, in their order; what looks slower is measured again after all others."""
    found: dict[Any, Verdict] = {}
    waiting: list[tuple[Any, list[Measurement]]] = []
    for case, run in zip(cases, measure(cases), strict=True):
        if "failed" in run:
            found[case] = Verdict(case, [run], "not measured")
        elif is_suspicious(run, threshold):
            waiting.append((case, [run]))
        else:
            found[case] = Verdict(case, [run], "faster" if is_faster(run, threshold) else "same")
    for case, runs in waiting:
        while len(runs) <= again and "failed" not in runs[-1] and is_suspicious(runs[-1], threshold):
            runs += measure([case])
        if "failed" in runs[-1]:
            found[case] = Verdict(case, runs, "not measured")
        else:
            found[case] = Verdict(case, runs, "regression" if is_suspicious(runs[-1], threshold) else "same")
    return [found[case] for case in cases]


def status(verdicts: Sequence[Verdict]) -> int:
    """What the command ends with: 1 for a regression, 2 where that cannot be said, else 0."""
    if any(verdict.kind == "regression" for verdict in verdicts):
        return 1
    unknown = [v for v in verdicts if v.kind == "not measured"]
    nothing = len(unknown) == len(verdicts)
    return 2 if nothing or not all(verdict.is_missing for verdict in unknown) else 0


COLUMNS = ["case", "pass", "base / this", "verdict"]


def page(
    verdicts: Sequence[Verdict], revision: str, facts: dict[str, Any], threshold: float = THRESHOLD
) -> str:
    """Markdown to attach to a change: the verdict, ratios, and what was measured where; no times."""
    slower = sum(v.kind == "regression" for v in verdicts)
    measured = sum(v.kind != "not measured" for v in verdicts)
    left = len(verdicts) - measured
    others = f" {left} could not be measured." if left else ""
    if slower:
        verdict = f"**Slower** in {slower} of {measured} cases than `{revision[:12]}`.{others}"
    elif not measured:
        verdict = f"**Not judged**: none of {left} cases could be compared with `{revision[:12]}`."
    elif status(verdicts):
        verdict = (
            f"**Not judged**: {left} of {len(verdicts)} cases could not be compared with `{revision[:12]}`."
        )
    else:
        verdict = (
            f"**No case is slower** than at `{revision[:12]}`, of {measured} that were measured.{others}"
        )
    machine, versions = facts["machine"], facts["versions"]
    own = f"`{(facts['commit']['revision'] or 'unknown')[:12]}`"
    place = (
        f"This tree: {own}{' with changes' if facts['commit']['dirty'] else ''}. {machine['cpu']}, "
        f"{machine['threads']} threads, {_selected(facts)}, PyTorch {versions['torch']}, "
        f"Python {versions['python']}, load {machine['load_average'][0]:.1f} at the start."
    )
    rule = (
        "`base / this`: above 1, this tree is faster. A case is slower where this is below "
        f"{1 - threshold:.2f} and no sample of this tree is as fast as any of the base, in every one of the "
        "measurements listed."
    )
    rows = [
        [_name(v.case[0]), v.case[2], ", ".join(f"{r:.2f}" for r in v.ratios) or "", _said(v)]
        for v in verdicts
    ]
    return f"{verdict}\n\n{place}\n\n{text_table(COLUMNS, rows, markdown=True)}\n\n{rule}\n"


def _name(entry: Any) -> str:
    """Of a case of a suite, or of a shape of the dense form."""
    return f"dense {entry.shape.name}" if isinstance(entry, Entry) else str(entry)


def _said(verdict: Verdict) -> str:
    if verdict.kind == "not measured":
        run, again = verdict.runs[-1], " again" if len(verdict.runs) > 1 else ""
        side = {"base": "the base", "this": "this tree"}.get(run["failed"], "one of the two")
        return f"not measured{again}: {side} cannot run it ({run['why']})"
    if verdict.kind == "same" and len(verdict.runs) > 1:
        return "not slower when measured again"
    return {"regression": "**slower**", "same": ""}.get(verdict.kind, verdict.kind)


def _selected(facts: dict[str, Any]) -> str:
    return (facts.get("instruction_sets") or {}).get("selected") or "no compiled kernels"
