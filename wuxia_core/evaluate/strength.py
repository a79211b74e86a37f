"""Measure learning, forgetting and copying at several strengths of the adapter; name the best."""

from typing import Any

from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import overlap
from wuxia_core.evaluate.scoring import bits_per_char
from wuxia_core.evaluate.writing import generate, prompts
from wuxia_core.mixing import VALIDATION

STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)  # times LoRA's output, 1 as trained
# A small sample, since each strength is a model to measure: openings of so many characters from so
# many documents of a source; passages of so many tokens after so many prompts.
DOCUMENTS, CHARACTERS, TOKENS, PROMPTS = 8, 150, 50, 4


def frontier(context: EvalContext) -> list[dict[str, float]]:
    """Measure a small sample at each strength of the adapter.

    Returns
    -------
    A row a strength: `strength`; `wuxia` and `general`, bits per character of held-out openings;
    `copied`, the longest run of characters that passages share with the training text. No row
    where 武侠 or general text has no held-out document; fewer rows where the time runs out.
    """
    from peft.helpers import rescale_adapter_scale

    loaded, window = (context.model, context.tokenizer), context.config.data.max_length
    texts = {source: openings(context, source) for source in ("wuxia", "general")}
    chosen_prompts = [row["prompt"] for row in prompts(context)[:PROMPTS]]
    rows: list[dict[str, Any]] = []
    if not all(texts.values()):
        return rows
    for (strength,) in context.within_budget("strengths measured", STRENGTHS, 1, 0.15):
        with rescale_adapter_scale(context.model, strength):
            passages = generate(context, chosen_prompts, context.seed, TOKENS)
            row: dict[str, Any] = {"strength": strength, "passages": passages}
            for source, opening_texts in texts.items():
                row[source] = bits_per_char(*loaded, opening_texts, window, context.pass_tokens)
            rows.append(row)
    passages = [passage for row in rows for passage in row.pop("passages")]
    lengths = overlap(passages, context.mixture.training_texts)["length"]
    longest = lengths.groupby(lengths.index // len(chosen_prompts)).max()  # of each strength
    return [row | {"copied": int(n)} for row, n in zip(rows, longest, strict=True)]


def openings(context: EvalContext, source: str) -> list[str]:
    """Take the first 150 characters of a source's held-out documents, of eight at most."""
    numbers = context.documents(source, VALIDATION, limit=DOCUMENTS)
    return [text[:CHARACTERS] for text in context.mixture.texts(numbers)]


def best_strength(rows: list[dict[str, float]], margin: float, most_copied: int) -> float | None:
    """Name the strength with the fewest bits per character of 武侠 among those that do no harm.

    `rows` are those of `frontier`, strength 0 first. A strength does harm where general text takes
    over `margin` bits per character more than at strength 0, or a copied run reaches `most_copied`
    characters. None where no strength is left.
    """
    base = rows[0]["general"] if rows else 0
    harmless = [r for r in rows if r["general"] <= base + margin and r["copied"] < most_copied]
    return min(harmless, key=lambda row: row["wuxia"])["strength"] if harmless else None
