"""How strong should the adapter be? Learning, forgetting and copying along LoRA's strength."""

from typing import Any

from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import overlap
from wuxia_core.evaluate.scoring import bits_per_char
from wuxia_core.evaluate.writing import generate, prompts
from wuxia_core.mixing import VALIDATION

STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)  # times LoRA's output, 1 as trained
DOCUMENTS, CHARACTERS, PROMPTS, TOKENS = 8, 150, 4, 50  # a small sample: each strength is a model


def frontier(context: EvalContext) -> list[dict[str, float]]:
    """Measure a small sample at each strength; empty where a source has no held-out text.

    Returns
    -------
    A row a strength: `strength`; `wuxia` and `general`, bits per character of held-out openings;
    `copied`, the longest run of characters that passages share with the training text.
    """
    from peft.helpers import rescale_adapter_scale

    both, window = (context.model, context.tokenizer), context.config.data.max_length
    texts = {source: openings(context, source) for source in ("wuxia", "general")}
    asked = [row["prompt"] for row in prompts(context)[:PROMPTS]]
    rows: list[dict[str, Any]] = []
    if not all(texts.values()):
        return rows
    for (strength,) in context.within_budget("strengths measured", STRENGTHS, 1, 0.15):
        with rescale_adapter_scale(context.model, strength):
            written = generate(context, asked, context.seed, TOKENS)
            rows.append({"strength": strength, "written": written})
            for source, some in texts.items():
                rows[-1][source] = bits_per_char(*both, some, window, context.pass_tokens)
    every = [text for row in rows for text in row.pop("written")]
    lengths = overlap(every, context.mixture.training_texts)["length"]
    longest = lengths.groupby(lengths.index // len(asked)).max()
    return [row | {"copied": int(n)} for row, n in zip(rows, longest, strict=True)]


def openings(context: EvalContext, source: str) -> list[str]:
    """Take the beginnings of some held-out documents."""
    numbers = context.documents(source, VALIDATION, limit=DOCUMENTS)
    return [text[:CHARACTERS] for text in context.mixture.texts(numbers)]


def best_strength(rows: list[dict[str, float]], margin: float, most_copied: int) -> float | None:
    """Name the strength that learns most of 武侠, with general text kept and nothing copied."""
    base = rows[0]["general"] if rows else 0
    kept = [r for r in rows if r["general"] <= base + margin and r["copied"] < most_copied]
    return min(kept, key=lambda row: row["wuxia"])["strength"] if kept else None
