"""Passages that a model writes: the same prompts and seeds for base and tuned."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wuxia_core.evaluate.subject import Subject
from wuxia_core.mixing.store import TRAIN, VALIDATION
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Beside the openings of held-out chapters; written for this, in no book.
WRITTEN = (
    "剑光一闪",
    "夜雨打在客栈的瓦上，门忽然开了。",
    "那老僧合十道：",
    "渡口只剩下最后一条船，船家却不肯开。",
    "她把那封信凑到灯前，看了又看，",
    "镖车行到黑松林外，前头的趟子手忽然勒住了马。",
    "“你师父没有教过你么？”",
    "擂台下鸦雀无声，",
    "山路尽头是一座破庙，庙里有火光。",
    "三更鼓响，墙头上翻进来一个人。",
)
WRITERS = ("base", "tuned", "few_shot")
AT_ONCE = 16  # passages
OPENINGS = 30  # of held-out chapters
OPENING = 40  # characters of a chapter that serve as its prompt
EXAMPLE = 60  # characters of 武侠 that the base sees first, as a control
TOKENS = 200  # of each passage; the end of text may not come before
CHARACTERS = 150  # of each passage that are compared, without white space: all of one length


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    seed: int,
    tokens: int = TOKENS,
) -> list[str]:
    """Sample what follows each prompt, all in one batch: temperature 0.9, nucleus 0.95.

    Parameters
    ----------
    prompts : sequence of str
        Each stands behind the end-of-text token that starts a document.
    seed : int
        Of this batch; the same one gives the same passages on the same kind of machine.
    tokens : int
        Length of each passage.
    """
    import torch

    start = document_start_id(tokenizer)
    encoded = tokenizer(
        list(prompts), add_special_tokens=False, split_special_tokens=True
    ).input_ids
    longest = 1 + max(map(len, encoded))
    rows = [[start] * (longest - len(ids)) + ids for ids in encoded]  # filled up at the left
    seen = [[0] * (longest - 1 - len(ids)) + [1] * (1 + len(ids)) for ids in encoded]
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            do_sample=True, temperature=0.9, top_p=0.95, top_k=0, repetition_penalty=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    written: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return written


def prompts(subject: Subject) -> list[dict[str, Any]]:
    """Give ten written prompts and openings of held-out chapters, whose own text is `human`."""
    chapters = subject.mixture.texts(subject.documents("wuxia", VALIDATION, limit=OPENINGS))
    rows = [{"prompt": prompt, "human": ""} for prompt in WRITTEN]
    return rows + [{"prompt": t[:OPENING], "human": t[OPENING:]} for t in chapters]


def write(subject: Subject) -> list[dict[str, Any]]:
    """Let base and tuned go on from the same prompts, and the base after an example of 武侠 too.

    Returns rows with `prompt`, `human`, `base`, `tuned` and `few_shot`.
    """
    chapter = next(iter(subject.mixture.texts(subject.documents("wuxia", TRAIN, limit=1))), "")
    example = chapter[len(chapter) // 2 :][:EXAMPLE]
    rows: list[dict[str, Any]] = []
    for chunk in subject.in_time("prompts written to", prompts(subject), AT_ONCE, 0.25):
        asked, seed = [row["prompt"] for row in chunk], subject.seed + len(rows)
        base, tuned = subject.both(
            functools.partial(generate, subject.model, subject.tokenizer, asked, seed)
        )
        with subject.model.disable_adapter():
            after = [f"{example}\n{prompt}" for prompt in asked]
            few_shot = generate(subject.model, subject.tokenizer, after, seed)
        said = zip(chunk, base, tuned, few_shot, strict=True)
        rows += [{**row, "base": b, "tuned": t, "few_shot": f} for row, b, t, f in said]
    return rows
