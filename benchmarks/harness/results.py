"""Results on disk: JSON of what tables and pictures need, small enough to be kept in git.

Floats have five digits, and of samples only their number is kept. Records (dicts in a list, or by name in a
dict) become a table, ``{"columns": [...], "rows": [...]}``, where the names of their fields stand once. The
first column of records by name is called "". Where a field is not in all of the records, its column ends in
"?", and null stands for what is not there.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "results"
DIGITS = 5  # a ratio is shown with three or four
FEWEST = 4  # records that are stored as a table; fewer are clearer as dicts
SAMPLES = "samples_s"


def compact(value: Any) -> Any:
    """A result as it is written."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        if _are_records(value.values()):
            return _table([{"": name} | record for name, record in value.items()])
        return _fields(value)
    if isinstance(value, list | tuple):
        return _table(value) if _are_records(value) else [compact(one) for one in value]
    return value


def _are_records(values: Collection[Any]) -> bool:
    return len(values) >= FEWEST and all(isinstance(one, dict) for one in values)


def _fields(record: dict[str, Any]) -> dict[str, Any]:
    kept = {name: compact(one) for name, one in record.items() if name != SAMPLES}
    return kept | ({"samples": len(record[SAMPLES])} if SAMPLES in record else {})


def _table(records: Collection[dict[str, Any]]) -> dict[str, Any]:
    found = [_fields(record) for record in records]
    names = list(dict.fromkeys(name for record in found for name in record))
    columns = [name if all(name in record for record in found) else f"{name}?" for name in names]
    return {"columns": columns, "rows": [[record.get(name) for name in names] for record in found]}


def expanded(value: Any) -> Any:
    """The dicts and lists of which ``compact`` made tables; what has none is returned as it is."""
    if isinstance(value, list):
        return [expanded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"columns", "rows"}:
        return {name: expanded(one) for name, one in value.items()}
    found = [_record(value["columns"], row) for row in value["rows"]]
    return {record.pop(""): record for record in found} if value["columns"][0] == "" else found


def _record(columns: list[str], row: list[Any]) -> dict[str, Any]:
    cells = zip(columns, row, strict=True)
    present = [(column, cell) for column, cell in cells if cell is not None or not column.endswith("?")]
    return {column.removesuffix("?"): expanded(cell) for column, cell in present}


def write(path: Path, result: dict[str, Any]) -> None:
    """A line for each field of the result and for each row of its tables; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    lines = [f"{_json(name)}: {_lines_of(one)}" for name, one in compact(result).items()]
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(path)


def _lines_of(value: Any) -> str:
    if not isinstance(value, dict) or value.keys() != {"columns", "rows"}:
        return _json(value)
    rows = ",\n".join(map(_json, value["rows"]))
    return f'{{"columns": {_json(value["columns"])}, "rows": [\n{rows}]}}'


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def read(path: Path) -> dict[str, Any]:
    return expanded(json.loads(path.read_text()))
