"""What a run says last: what fell, what rose, and a passage by each."""

from typing import Any

import pandas as pd

from wuxia_core.config import EvaluationConfig

FORGETTING = ("bits_per_char", "general")
CHANCE = " (may be chance)"


def closing_table(card: dict[str, Any]) -> str:
    """Say whether left-to-right prediction fell or rose, the verdicts, all metrics, two passages.

    Strata are left to the report.
    """
    rows = [{"reason": None, **row} for row in card["metrics"] if "," not in row["name"]]
    table = pd.DataFrame(rows)
    lines = [_direction(table), *_verdicts(table), *_hint(card), ""]
    for row in table.itertuples():
        label = f"  {row.source:10}{row.name:18}"
        if pd.isna(row.delta):
            lines.append(f"{label}not measured: {row.reason}")
            continue
        lines.append(
            f"{label}{row.base:8.3f} → {row.tuned:8.3f}  {_way(row):9} {row.delta:+.3f} "
            f"[{row.low:+.3f}, {row.high:+.3f}] {row.unit}, n = {row.n}"
        )
    for passage in card["passages"][:1]:
        lines += ["", f"{passage['prompt']} …"]
        lines += [f"{writer + ':':7}{_short(passage[writer])}" for writer in ("base", "tuned")]
    return "\n".join(lines)


def _hint(card: dict[str, Any]) -> list[str]:
    """Say what the comparison found, to who trains on masked tokens alone."""
    if card.get("objective") != "masked":
        return []
    return ["in our comparison training.objective=clm learned more of the style: see notebook 06"]


def gate_failures(card: dict[str, Any], limits: EvaluationConfig) -> list[str]:
    """Name what speaks against publishing an adapter: copied text, or wits that were lost.

    Copying and general text have to be measured; where the sample is too small to tell whether
    wits were kept, nothing speaks against it.
    """
    rows = {row["name"]: row for row in card["metrics"]}
    found = [
        f"a passage shares {copied['length']} characters in a row with {copied['title']}, "
        f"evaluation.max_copied is {limits.max_copied}: {copied['generated']}"
        for copied in card["copied"]
        if copied["length"] >= limits.max_copied
    ]
    for name in ("copied_length", "extraction_near"):
        if rows[name]["delta"] is None:
            found.append(f"{name} was not measured: {rows[name]['reason']}")
    extracted = rows["extraction_near"]["tuned"]
    if extracted is not None and extracted > limits.max_extracted:
        found.append(
            f"of training prefixes {extracted:.0%} more than of others are continued as in the "
            f"book, evaluation.max_extracted is {limits.max_extracted:.0%}"
        )
    general = next(r for r in card["metrics"] if (r["name"], r["source"]) == FORGETTING)
    if general["verdict"] == "not measured":
        found.append(f"general text was not measured: {general['reason']}")
    if general["verdict"] == "worse":
        found.append(
            f"general text costs {general['delta']:.3f} bits a character more, certainly over "
            f"evaluation.general_margin, {general['margin']}"
        )
    if rows["wits"]["verdict"] == "worse":
        found.append(f"the wits fell by more than evaluation.wits_margin, {rows['wits']['margin']}")
    return found


def _short(text: str) -> str:
    return " ".join(text.split())[:120]


def _verdicts(table: pd.DataFrame) -> list[str]:
    """Say whether general text and wits were kept within their margins."""
    judged = table[table["verdict"].notna()]
    names = {"bits_per_char": "general text", "wits": "wits"}
    return [
        f"{names[row.name]}, within {row.margin:g}: {row.verdict}"
        + (f" ({row.reason})" if isinstance(row.reason, str) and row.reason else "")
        for row in judged.itertuples(index=False)
    ]


def _way(row: Any) -> str:
    """Name the change; one whose interval holds 0 may be chance."""
    if row.low <= 0 <= row.high:
        return "no change"
    return "fell" if row.delta < 0 else "rose"


def _direction(table: pd.DataFrame) -> str:
    """Say what became of left-to-right prediction, the worst first."""
    bits = table[(table["name"] == "bits_per_char") & table["delta"].notna()]
    if bits.empty:
        return "bits per character were not measured: too little held-out text"
    rows = list(bits.sort_values("delta", ascending=False).itertuples())
    parts = [f"{row.source} {row.delta:+.3f}{CHANCE * (_way(row) == 'no change')}" for row in rows]
    ways = {_way(row) for row in rows}
    way = "ROSE" if "rose" in ways else "fell" if "fell" in ways else "did not change for certain"
    return f"bits per character {way} (lower is better): {', '.join(parts)}"
