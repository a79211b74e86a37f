"""Judge an adapter against its base on text neither was trained on, and write `scorecard.json`.

    python -m wuxia_core.evaluate output/wuxia_lora

Every figure is measured for the base and for the tuned model on the same documents; the interval
of a difference comes from resampling documents, never tokens.
"""

import argparse
import json
import logging
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from wuxia_core import mixing, model
from wuxia_core.config import Config, load_config
from wuxia_core.errors import ConfigError, DataError, WuxiaError
from wuxia_core.masking import IGNORE_INDEX, MaskCollator, model_inputs

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESAMPLES = 10_000
FEWEST_DOCUMENTS = 5  # below that an interval over documents means nothing
PROMPT = "剑光一闪"
PASSAGE_TOKENS = 80

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A figure to report: a ratio of sums over documents."""

    name: str
    unit: str
    numerator: str
    denominator: str


METRICS = (
    Metric("bits_per_char", "bits/character", "bits", "chars"),
    Metric("masked_loss", "nats/masked token", "nats", "asked"),
    Metric("masked_accuracy", "share of masked tokens", "right", "asked"),
)


def bits_per_char(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    window: int = 256,
    batch_size: int = 8,
) -> float:
    r"""Measure how well a model predicts texts, left to right: lower is better.

    :math:`-\sum_t \log_2 p(x_t \mid x_{<t}) / C` over Unicode code points C after NFC, so that
    tokenizers compare. Each token is scored once, with at least half a window before it where the
    text is that long; an end-of-text token stands in front of each text.

    Parameters
    ----------
    texts : sequence of str
        At least one character in all.
    window : int
        Context, tokens; windows overlap by half.
    batch_size : int
        Windows a forward pass.

    Returns
    -------
    Bits per character over all texts together.

    Raises
    ------
    DataError
        Where there is no character.
    """
    table = document_bits(model, tokenizer, texts, window, batch_size)
    if not table["chars"].sum():
        raise DataError("bits_per_char: the texts are empty")
    return float(table["bits"].sum() / table["chars"].sum())


def document_bits(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    window: int,
    batch_size: int,
) -> pd.DataFrame:
    """Score each text: columns `bits` and `chars`, a row a text."""
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    tokens, _ = mixing.tokenize(normal, tokenizer)
    rows = [row for n, ids in enumerate(tokens) for row in _sliding(n, ids, window)]
    batches = (
        _asked_batch(rows[start : start + batch_size], int(tokenizer.eos_token_id))
        for start in range(0, len(rows), batch_size)
    )
    total = -(-len(rows) // batch_size)
    scores = _score_all(model, tqdm(batches, desc="bits per character", total=total, leave=False))
    owner = np.array([n for n, _, labels in rows for _ in range((labels != IGNORE_INDEX).sum())])
    bits = np.bincount(owner, scores["nats"] / np.log(2), minlength=len(normal))
    return pd.DataFrame({"bits": bits, "chars": [len(text) for text in normal]})


def _sliding(
    number: int, tokens: mixing.Tokens, window: int
) -> Iterator[tuple[int, mixing.Tokens, mixing.Tokens]]:
    """Cut windows that overlap by half; `labels` asks for each token but the first exactly once."""
    scored = 1
    for start in range(0, max(1, len(tokens) - window // 2), window // 2):
        ids = tokens[start : start + window]
        labels = ids.copy()
        labels[: scored - start] = IGNORE_INDEX
        scored = start + len(ids)
        yield number, ids, labels


def _asked_batch(
    rows: Sequence[tuple[int, mixing.Tokens, mixing.Tokens]], pad: int
) -> "dict[str, torch.Tensor]":
    shape = len(rows), max(len(ids) for _, ids, _ in rows)
    input_ids = np.full(shape, pad, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for row, (_, ids, asked) in enumerate(rows):
        input_ids[row, : len(ids)], labels[row, : len(ids)] = ids, asked
    return model_inputs(input_ids, labels)


def _score_all(model: "PreTrainedModel", batches: Any) -> dict[str, Floats]:
    """Score every asked token, in order: `nats` and whether the best guess was `right`."""
    parts = [_score(model, batch) for batch in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("nats", "right")}


def _score(model: "PreTrainedModel", batch: "dict[str, torch.Tensor]") -> dict[str, Floats]:
    import torch
    import torch.nn.functional as F

    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits.float()  # (N, V)
        targets = labels[labels != IGNORE_INDEX]
        nats = F.cross_entropy(logits, targets, reduction="none")
    right = logits.argmax(-1) == targets
    return {"nats": nats.double().cpu().numpy(), "right": right.double().cpu().numpy()}


def masked_recovery(
    model: "PreTrainedModel", collate: MaskCollator, windows: mixing.Windows, batch_size: int
) -> pd.DataFrame:
    """Score the masks of epoch 0: columns `nats`, `right`, `asked`, a row a document."""
    starts = range(0, len(windows), batch_size)
    scores, asked = [], []
    for start in tqdm(starts, desc="masked recovery", leave=False):
        stop = min(start + batch_size, len(windows))
        batch = collate([windows[row] for row in range(start, stop)])
        asked += (batch["labels"] != IGNORE_INDEX).sum(1).tolist()
        scores.append(_score(model, batch))
    owner = np.repeat(windows.documents, asked)
    table = pd.DataFrame({key: np.concatenate([s[key] for s in scores]) for key in scores[0]})
    return table.assign(asked=1).groupby(owner).sum()


def compare(base: pd.DataFrame, tuned: pd.DataFrame, metric: Metric, seed: int) -> dict[str, Any]:
    """Report a metric for both models with the 95 % interval of the difference.

    A paired bootstrap (Efron & Tibshirani 1993, percentile interval): the same documents are drawn
    for both, 10,000 times.
    """
    n = len(base)
    head = {"name": metric.name, "unit": metric.unit}
    if n < FEWEST_DOCUMENTS:
        empty = dict.fromkeys(("base", "tuned", "delta", "low", "high"))
        reason = f"{n} held-out documents, fewer than {FEWEST_DOCUMENTS}"
        return {**head, **empty, "n": n, "reason": reason}
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    values = {}
    for side, table in (("base", base), ("tuned", tuned)):
        top = table[metric.numerator].to_numpy(np.float64)
        bottom = table[metric.denominator].to_numpy(np.float64)
        resampled = top[drawn].sum(1) / bottom[drawn].sum(1)
        values[side] = top.sum() / bottom.sum(), resampled
    low, high = np.percentile(values["tuned"][1] - values["base"][1], [2.5, 97.5])
    point = {side: float(value[0]) for side, value in values.items()}
    delta = point["tuned"] - point["base"]
    return {**head, **point, "delta": delta, "low": float(low), "high": float(high), "n": n}


def evaluate(output_dir: str | Path) -> dict[str, Any]:
    """Score a run folder and write `scorecard.json` into it.

    Raises
    ------
    DataError
        Where the folder holds no finished adapter, or its mixture is gone.
    """
    import torch

    folder = Path(output_dir)
    base_name = model.adapter_base(folder)
    config = load_config(folder / "config.yaml")
    mixture = mixing.open_mixture(mixing.mixture_folder(config.data.processed_data_file))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tuned, tokenizer = model.load_adapter(folder, device)
    collate = MaskCollator.from_config(config, tokenizer, model.adapter_mask_id(folder), "masked")
    rows = []
    for source in ("wuxia", "general"):
        with tuned.disable_adapter():
            base_scores = _documents(tuned, tokenizer, collate, mixture, source, config)
        scores = _documents(tuned, tokenizer, collate, mixture, source, config)
        for metric in METRICS:
            row = compare(base_scores, scores, metric, config.training.seed)
            rows.append({"source": source, **row})
    passages = _passages(tuned, tokenizer, config.training.seed)
    card = {"base": base_name, "adapter": str(folder), "metrics": rows, "passages": passages}
    text = json.dumps(card, ensure_ascii=False, indent=1)
    (folder / "scorecard.json").write_text(text, encoding="utf-8")
    return card


def scorecard(output_dir: str | Path) -> dict[str, Any]:
    """Read a run folder's `scorecard.json`; measure it first where there is none.

    Raises
    ------
    DataError
        Where the folder holds no finished adapter.
    """
    path = Path(output_dir) / "scorecard.json"
    if path.is_file():
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return card
    return evaluate(output_dir)


def _documents(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    collate: MaskCollator,
    mixture: mixing.Mixture,
    source: str,
    config: Config,
) -> pd.DataFrame:
    """Score a source's held-out documents in every way: a row a document that has windows."""
    limit, seed = config.evaluation.max_documents, config.training.seed
    windows = mixing.held_out_windows(mixture, limit, seed).get(source)
    if windows is None:
        return pd.DataFrame(columns=["bits", "chars", "nats", "right", "asked"])
    batch_size = config.training.per_device_eval_batch_size
    recovered = masked_recovery(model, collate, windows, batch_size)
    texts = mixture.documents.loc[recovered.index, "text"].tolist()
    bits = document_bits(model, tokenizer, texts, config.data.max_length, batch_size)
    return recovered.assign(bits=bits["bits"].to_numpy(), chars=bits["chars"].to_numpy())


def _passages(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", seed: int
) -> dict[str, str]:
    """Let base and tuned continue the same prompt from the same seed."""
    with model.disable_adapter():
        base = continuation(model, tokenizer, PROMPT, seed)
    return {
        "prompt": PROMPT,
        "base": base,
        "tuned": continuation(model, tokenizer, PROMPT, seed),
    }


def continuation(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, seed: int
) -> str:
    """Sample 80 tokens after a prompt (temperature 0.9, nucleus 0.95); the global RNG is kept."""
    import torch

    inputs = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt").to(model.device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=0.9,
            top_p=0.95,
            max_new_tokens=PASSAGE_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def closing_table(card: dict[str, Any]) -> str:
    """Say what fell and what rose, worst news first, then show the two passages."""
    table = pd.DataFrame(card["metrics"])
    lines = [_verdict(table)]
    for row in table.itertuples():
        label = f"  {row.source:8}{row.name:16}"
        if pd.isna(row.delta):
            lines.append(f"{label}not measured: {row.reason}")
            continue
        way = "fell" if row.delta < 0 else "rose"
        lines.append(
            f"{label}{row.base:8.3f} → {row.tuned:8.3f}  {way} by {abs(row.delta):.3f} "
            f"[{row.low:+.3f}, {row.high:+.3f}] {row.unit}, n = {row.n}"
        )
    passages = card["passages"]
    return "\n".join([*lines, "", f"base:  {passages['base']}", "", f"tuned: {passages['tuned']}"])


def _verdict(table: pd.DataFrame) -> str:
    """Say first whether left-to-right prediction got worse, then whether masks are recovered."""
    bits = table[(table["name"] == "bits_per_char") & table["delta"].notna()]
    rose = [f"{row.source} by {row.delta:.3f}" for row in bits.itertuples() if row.delta > 0]
    if rose:
        return f"bits per character ROSE (worse left to right): {', '.join(rose)}"
    if bits.empty:
        return "bits per character were not measured: too little held-out text"
    return "bits per character fell on every held-out source"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m wuxia_core.evaluate", description=__doc__)
    parser.add_argument("output_dir", help="run folder, as in training.output_dir")
    parser.add_argument("--gate", action="store_true", help="fail over a threshold (not yet)")
    options = parser.parse_args(arguments)
    try:
        if options.gate:
            raise ConfigError("--gate: not yet; leave it out")
        print(closing_table(evaluate(options.output_dir)))
    except WuxiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
