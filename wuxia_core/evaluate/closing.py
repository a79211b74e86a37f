"""What a run says last: what fell, what rose, and a passage by each."""

from typing import Any

import pandas as pd


def closing_table(card: dict[str, Any]) -> str:
    """Say what fell and what rose, worst news first, then show the two passages."""
    table = pd.DataFrame(card["metrics"])
    lines = [_verdict(table), ""]
    for row in table.itertuples():
        label = f"  {row.source:8}{row.name:16}"
        if pd.isna(row.delta):
            lines.append(f"{label}not measured: {row.reason}")
            continue
        lines.append(
            f"{label}{row.base:7.3f} → {row.tuned:7.3f}  {_way(row):9} {row.delta:+.3f} "
            f"[{row.low:+.3f}, {row.high:+.3f}] {row.unit}, n = {row.n}"
        )
    passages = card["passages"]
    return "\n".join([*lines, "", f"base:  {passages['base']}", "", f"tuned: {passages['tuned']}"])


def _way(row: Any) -> str:
    """Name the change; one whose interval holds 0 may be chance."""
    if row.low <= 0 <= row.high:
        return "no change"
    return "fell" if row.delta < 0 else "rose"


def _verdict(table: pd.DataFrame) -> str:
    """Say what became of left-to-right prediction, what rose first."""
    bits = table[(table["name"] == "bits_per_char") & table["delta"].notna()]
    if bits.empty:
        return "bits per character were not measured: too little held-out text"
    rose = [row for row in bits.itertuples() if row.delta > 0]
    parts = [
        f"{row.source} {row.delta:+.3f}" + (" (may be chance)" if _way(row) == "no change" else "")
        for row in rose or bits.itertuples()
    ]
    head = "bits per character ROSE" if rose else "bits per character fell"
    return f"{head} (lower is better): {', '.join(parts)}"
