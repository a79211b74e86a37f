"""`metrics.jsonl`: a row for each thing that was logged, by the attempts of a run one by one.

Rows have `step` and `time` (s), and either figures or an `event`: started, resumed, checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read a run's rows without what a resumed attempt did again; a row that was cut off is left.

    Of `step 1, 2, 3, resumed at 2, 3` the first 3 is dropped.
    """
    rows: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        if row.get("event") in ("started", "resumed"):
            rows = [old for old in rows if old["step"] <= row["step"]]
        rows.append(row)
    return rows


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own also where the last one was cut off."""
    with (folder / METRICS).open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
