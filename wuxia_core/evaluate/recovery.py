"""The mask X-ray: what the model answers where a token is hidden, base and tuned side by side."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from wuxia_core.corpus import CLASSES, Segmenter, classes, dialogue
from wuxia_core.errors import DataError
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.statistics import Metric, Row, compare, ratio
from wuxia_core.masking import (
    IGNORE_INDEX,
    KEPT,
    SINGLE,
    SPAN,
    Corruption,
    Kinds,
    MaskCollator,
    SpanMasker,
    Window,
)
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, encode_passage
from wuxia_core.model import mask_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


GUESSES = 5
AROUND = 8  # characters shown on either side of a span
AT_ONCE = 8  # documents
NO_TOKENS = ["document", "base_nats", "tuned_nats", "base_right", "tuned_right"]


@dataclass(frozen=True)
class XRay:
    """The masked tokens of some texts, and what each model predicted there.

    `tokens` has a row a masked token: `text` (which of `texts`), `[start, end)` in its characters,
    `token`, `before` and `after` (the masked token and its neighbours, ids; -1 where there is
    none), `block` (masked tokens that stand together), `kind` (1 single, 2 span), `class`,
    `dialogue`, and for each of `models` its `bits` (loss), `right` and `guesses` ((token,
    probability), best first), as `base_bits` and so on.
    """

    texts: tuple[str, ...]
    tokens: pd.DataFrame
    models: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Mean loss in bits and share of right answers, by class of token and by who speaks."""
        speech = self.tokens["dialogue"].map({True: "dialogue", False: "narration"})
        groups = pd.concat([self.tokens.assign(of=of) for of in (self.tokens["class"], speech)])
        columns = {"tokens": ("kind", "size")} | {
            f"{model} {name}": (f"{model}_{name}", "mean")
            for name in ("bits", "right")
            for model in self.models
        }
        table = groups.groupby("of").agg(**columns)
        order = [name for name in (*CLASSES[::-1], "dialogue", "narration") if name in table.index]
        return table.loc[order].rename_axis(None).reset_index(names="")

    def spans(self) -> pd.DataFrame:
        """Spans by what tuning did to them, a row each: most helped first.

        Columns: what stands before, the span, what stands behind, bits a token of base and tuned,
        and the change.
        """
        columns = {"start": ("start", "min"), "end": ("end", "max")}
        columns |= {model: (f"{model}_bits", "mean") for model in self.models}
        tokens = self.tokens[self.tokens["kind"] == SPAN]
        spans = tokens.groupby(["text", "block"]).agg(**columns).reset_index()
        places = zip(spans["text"], spans["start"], spans["end"], strict=True)
        texts = ((self.texts[number], start, end) for number, start, end in places)
        shown = [(t[max(0, a - AROUND) : a], t[a:b], t[b : b + AROUND]) for t, a, b in texts]
        table = pd.DataFrame(shown, columns=["before", "span", "behind"])
        table = table.join(spans[list(self.models)])
        if len(self.models) > 1:
            table["change"] = table["tuned"] - table["base"]
        return table.sort_values(table.columns[-1], kind="stable", ignore_index=True)


def xray(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    masker: SpanMasker | None = None,
    key: int = 0,
    *,
    window: int = 256,
    batch_size: int = 8,
) -> XRay:
    """Predict the masked tokens of texts, as in training; with an adapter, without it too.

    The first text is masked as `show_masks` masks it with the same `masker` and `key`, as long as
    it is no longer than a `window` of tokens; the next has the next key. Raises `DataError` where
    no token is masked.
    """
    collate = _collator(model, tokenizer, masker or SpanMasker())
    tables: list[pd.DataFrame] = []
    windows: list[Window] = []
    for number, text in enumerate(texts):
        whole, offsets = encode_passage(text, tokenizer, Segmenter())
        chunks = list(_split(whole, window, key + len(windows)))
        kinds = np.concatenate([collate.kinds([chunk])[0] for chunk in chunks])[1:]
        tables.append(_masked_tokens(text, whole, offsets, kinds).assign(text=number))
        windows += chunks
    if not any(map(len, tables)):
        raise DataError("xray: no token is masked; the texts are too short for the mask ratio")
    table = pd.concat(tables, ignore_index=True)
    batches = [collate(windows[n : n + batch_size]) for n in range(0, len(windows), batch_size)]
    models = ("base", "tuned") if hasattr(model, "peft_config") else ("base",)
    training = model.training
    model.eval()
    for name in models:
        with model.disable_adapter() if name != models[-1] else nullcontext():
            answers = _predict(model, tokenizer, tqdm(batches, f"X-ray, {name}", leave=False))
        table = table.join(answers.add_prefix(f"{name}_"))
    model.train(training)
    return XRay(tuple(texts), table, models)


def _collator(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", masker: SpanMasker
) -> MaskCollator:
    adapter = getattr(model, "peft_config", {}).get("default")
    indices = getattr(adapter, "trainable_token_indices", None)
    mask_id = indices[0] if indices else mask_token_id(tokenizer, model.config.vocab_size)
    corruption = Corruption.of(tokenizer, mask_id, (1.0, 0.0, 0.0), masker.seed)
    special = frozenset(tokenizer.all_special_ids)
    return MaskCollator(masker, corruption, int(tokenizer.pad_token_id or 0), special)


def _split(whole: Window, size: int, key: int) -> Iterator[Window]:
    """Split a text's window into windows of at most `size` tokens, each with a key of its own."""
    for number, start in enumerate(range(0, len(whole.input_ids), size)):
        part = slice(start, start + size)
        ids, words, places = whole.input_ids[part], whole.word_ids[part], whole.position_ids[part]
        yield Window(ids, words, places - start, key + number, whole.epoch)


def _masked_tokens(
    text: str, whole: Window, offsets: Sequence[tuple[int, int]], kinds: Kinds
) -> pd.DataFrame:
    """Describe the masked tokens of a text, a row each, as in `XRay.tokens`."""
    at = np.flatnonzero(kinds > KEPT)
    spans = [offsets[token] for token in at.tolist()]
    by_character, speech = classes(text, Segmenter()), dialogue(text)
    ids = np.append(whole.input_ids, -1)
    return pd.DataFrame(
        {
            "start": [start for start, _ in spans],
            "end": [end for _, end in spans],
            "block": np.cumsum(np.diff(kinds > KEPT, prepend=False))[at],  # odd inside a block
            "kind": kinds[at],
            "class": [CLASSES[by_character[start:end].max()] for start, end in spans],
            "dialogue": [speech[start:end].all() for start, end in spans],
            "token": ids[at + 1],  # the window begins with a token that is not the text's
            "before": ids[at],
            "after": ids[at + 2],
        }
    )


def _predict(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batches: Iterable[Any]
) -> pd.DataFrame:
    """Give loss in bits, whether the best guess was right, and guesses; a row a masked token."""
    import torch

    parts = []
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        targets = labels[labels != IGNORE_INDEX]  # (N,)
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits.float()  # (N, V)
            log2 = torch.log_softmax(logits, dim=-1) / math.log(2)
        best = log2.topk(GUESSES, dim=-1)  # (N, 5)
        bits = -log2.gather(1, targets[:, None])[:, 0]
        parts.append([row.cpu() for row in (bits, targets, best.indices, best.values.exp2())])
    bits, targets, guesses, shares = (torch.cat(rows) for rows in zip(*parts, strict=True))
    names = {token: _name(tokenizer, token) for token in guesses.unique().tolist()}
    named = [
        tuple((names[token], share) for token, share in zip(*row, strict=True))
        for row in zip(guesses.tolist(), shares.tolist(), strict=True)
    ]
    right = (guesses[:, 0] == targets).numpy()
    return pd.DataFrame({"bits": bits.double().numpy(), "right": right, "guesses": named})


def _name(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Write a token; one that is a part of a character goes by its number."""
    text = str(tokenizer.decode([token]))
    return f"#{token}" if "\ufffd" in text or not text else text


def recovery(context: EvalContext) -> list[Row]:
    """Loss and accuracy at the masks of epoch 0 by source, and of 武侠 at singles and in spans.

    Beside the accuracies of 武侠 stand those of the commonest token (`unigram`) and of the
    commonest between the two true neighbours in the training text (`trigram`).
    """
    rows = []
    for source in ("wuxia", "general"):
        tokens = _held_out_tokens(context, source)
        strata = {"masked_accuracy": tokens}
        if source == "wuxia" and len(tokens):
            tokens = tokens.assign(**_baselines(context.mixture, tokens))
            strata["masked_accuracy"] = tokens
            strata["masked_accuracy, single"] = tokens[tokens["kind"] == SINGLE]
            strata["masked_accuracy, span"] = tokens[tokens["kind"] == SPAN]
        rows.append(_row(context, tokens, "masked_loss", "nats/masked token", source, "nats"))
        for name, chosen in strata.items():
            rows.append(_row(context, chosen, name, "share of masked tokens", source, "right"))
            if "unigram" in chosen:
                rows[-1] |= chosen[["unigram", "trigram"]].mean().to_dict()
    return rows


def _held_out_tokens(context: EvalContext, source: str) -> pd.DataFrame:
    """X-ray the held-out documents of a source: a row a masked token."""
    parts = []
    documents = context.documents(source, VALIDATION)
    predict = partial(xray, context.model, context.tokenizer, batch_size=context.batch_size)
    masker, size = SpanMasker(seed=context.seed), context.config.data.max_length
    for chosen in context.within_budget("documents masked", documents, AT_ONCE, 0.08):
        texts, key = context.mixture.texts(chosen), chosen[0] << 20
        try:
            seen = predict(texts, masker, key, window=size).tokens
        except DataError:  # so short that no token is masked
            continue
        nats = {f"{side}_nats": seen[f"{side}_bits"] * np.log(2) for side in ("base", "tuned")}
        seen = seen.assign(document=np.array(chosen)[seen["text"]], **nats)
        parts.append(seen.drop(columns=["base_guesses", "tuned_guesses"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=NO_TOKENS)


def _row(
    context: EvalContext, tokens: pd.DataFrame, name: str, unit: str, source: str, value: str
) -> Row:
    """Compare base and tuned by document."""
    documents = tokens.assign(count=1).groupby("document")
    base, tuned = (
        documents[[f"{side}_{value}", "count"]].sum().set_axis(["sum", "count"], axis=1)
        for side in ("base", "tuned")
    )
    return compare(Metric(name, unit, source, ratio("sum", "count")), base, tuned, context.seed)


def _baselines(mixture: Mixture, tokens: pd.DataFrame) -> dict[str, Any]:
    """Say whether the two baselines are right at each masked token."""
    size = int(mixture.tokens.max()) + 2  # -1, for no neighbour, makes a pair that never occurs
    pairs = tokens["before"].to_numpy(np.int64) * size + tokens["after"].to_numpy(np.int64)
    counts, middles = np.zeros(size, np.int64), Counter[tuple[int, int]]()
    windows = mixture.windows
    trained = windows[(windows["split"] == TRAIN) & (windows["source"] == "wuxia")]
    for start, end in zip(trained["start"], trained["end"], strict=True):
        ids = mixture.tokens[start:end].astype(np.int64)
        np.add.at(counts, ids, 1)
        around = ids[:-2] * size + ids[2:]
        known = np.isin(around, pairs)
        middles.update(zip(around[known].tolist(), ids[1:-1][known].tolist(), strict=True))
    best = {pair: token for (pair, token), _ in reversed(middles.most_common())}
    guesses = [best.get(pair, -1) for pair in pairs.tolist()]
    return {"unigram": tokens["token"] == counts.argmax(), "trigram": tokens["token"] == guesses}
