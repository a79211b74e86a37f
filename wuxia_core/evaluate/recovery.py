"""The mask X-ray: what the model answers where a token is hidden, base and tuned side by side."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from wuxia_core.corpus import CLASSES, Segmenter, classes, dialogue
from wuxia_core.errors import DataError
from wuxia_core.evaluate.statistics import EvalContext, Metric, Row, compare, ratio
from wuxia_core.masking import (
    IGNORE_INDEX,
    KEPT,
    SINGLE,
    SPAN,
    Corruption,
    Kinds,
    MaskCollator,
    SpanMasker,
)
from wuxia_core.mixing import TRAIN, VALIDATION, Mixture, Window, encode_passage
from wuxia_core.model import mask_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


GUESSES = 5
AROUND = 8  # characters shown on either side of a span
SPANS = (3, 4, 5)
AT_ONCE = 8  # documents
PIECES = 2000  # of training text at a time, and what stands between
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class XRay:
    """What was asked of a model, and what it answered.

    `tokens` has a row a masked token: `text` (which of `texts`), `[start, end)` in its characters,
    `token`, `before` and `after` (what is hidden and its neighbours, ids; -1 where there is none),
    `block` (masked tokens that stand together), `kind` (1 single, 2 span), `class`, `dialogue`, and
    for each of `models` its `bits` (loss), `right` and `guesses` ((token, probability), best
    first), as `base_bits` and so on.
    """

    texts: tuple[str, ...]
    tokens: pd.DataFrame
    models: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Mean loss in bits and share of right answers, by class of token and by who speaks."""
        speech = self.tokens["dialogue"].map({True: "dialogue", False: "narration"})
        groups = pd.concat([self.tokens.assign(of=of) for of in (self.tokens["class"], speech)])
        columns = {"tokens": ("kind", "size")} | {
            f"{model} {name}": (f"{model}_{column}", "mean")
            for name, column in (("bits", "bits"), ("right", "right"))
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
        spans = self.tokens[self.tokens["kind"] == SPAN].groupby(["text", "block"])
        places = spans.agg(start=("start", "min"), end=("end", "max"))
        bits = spans[[f"{model}_bits" for model in self.models]].mean()
        rows = [
            (t[max(0, a - AROUND) : a], t[a:b], t[b : b + AROUND])
            for (number, _), a, b in places.itertuples()
            for t in [self.texts[number]]
        ]
        table = pd.DataFrame(rows, columns=["before", "span", "behind"])
        for model in self.models:
            table[model] = bits[f"{model}_bits"].to_numpy()
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
    epoch: int = 0,
    segmenter: Segmenter | None = None,
    shares: tuple[float, float, float] = (1.0, 0.0, 0.0),
    window: int = 256,
    batch_size: int = 8,
) -> XRay:
    """Ask a model for the masked tokens of texts, as training would, and keep its answers.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        With an adapter it is asked twice: `base` without it, `tuned` with it.
    texts : sequence of str
        The first is masked as `show_masks` masks it with the same `masker`, `key`, `epoch` and
        `segmenter`, as long as it is no longer than a window; the next has the next key.
    shares : (float, float, float)
        Of the masked tokens, how many are hidden, replaced and left; see `Corruption`.
    window : int
        Longer texts are cut, tokens.
    batch_size : int
        Windows a forward pass. Only masked positions go through the vocabulary projection.

    Raises
    ------
    DataError
        Where no token of the texts is masked.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    indices = getattr(adapter, "trainable_token_indices", None)
    mask_id = indices[0] if indices else mask_token_id(tokenizer, model.config.vocab_size)
    masker = masker or SpanMasker()
    collate = MaskCollator(
        masker,
        Corruption.of(tokenizer, mask_id, shares, masker.seed),
        pad_token_id=int(tokenizer.pad_token_id or 0),
        special_ids=frozenset(tokenizer.all_special_ids),
        span_unit="token" if segmenter is None else "word",
    )
    table, windows = _masked(
        texts, tokenizer, collate, segmenter or Segmenter(), key=key, epoch=epoch, size=window
    )
    if table.empty:
        raise DataError("xray: no token is masked; the texts are too short for the mask ratio")
    batches = [collate(windows[n : n + batch_size]) for n in range(0, len(windows), batch_size)]
    models = ("base",) if adapter is None else ("base", "tuned")
    training = model.training
    model.eval()
    for name in models:
        with model.disable_adapter() if name == "base" and adapter else nullcontext():
            answers = _answers(model, tokenizer, tqdm(batches, f"X-ray, {name}", leave=False))
        table = table.join(answers.add_prefix(f"{name}_"))
    model.train(training)
    return XRay(tuple(texts), table, models)


def _masked(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    collate: MaskCollator,
    segmenter: Segmenter,
    *,
    key: int,
    epoch: int,
    size: int,
) -> tuple[pd.DataFrame, list[Window]]:
    """Draw the masks of texts: a row a masked token, and the windows in the same order."""
    rows: list[pd.DataFrame] = []
    windows: list[Window] = []
    for number, text in enumerate(texts):
        whole, offsets = encode_passage(text, tokenizer, segmenter)
        pieces = list(_cut(whole._replace(epoch=epoch), size, key + len(windows)))
        kinds = np.concatenate([collate.kinds([piece])[0] for piece in pieces])[1:]
        asked = _asked(text, offsets, kinds, segmenter)
        rows.append(_with_neighbours(asked, whole, kinds).assign(text=number))
        windows += pieces
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(), windows


def _cut(whole: Window, size: int, key: int) -> Iterator[Window]:
    """Cut a text's window into windows of at most `size` tokens, each with a key of its own."""
    for number, start in enumerate(range(0, len(whole.input_ids), size)):
        part = slice(start, start + size)
        ids, words, places = whole.input_ids[part], whole.word_ids[part], whole.position_ids[part]
        yield Window(ids, words, places - start, key + number, whole.epoch)


def _asked(
    text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds, segmenter: Segmenter
) -> pd.DataFrame:
    """Describe the masked tokens of a text, a row each."""
    by_character, speech = classes(text, segmenter), dialogue(text)
    blocks = np.cumsum(np.diff(kinds > KEPT, prepend=False))  # odd inside a block
    rows = [
        (start, end, blocks[token], kinds[token], CLASSES[by_character[start:end].max()],
         speech[start:end].all())
        for token in np.flatnonzero(kinds > KEPT).tolist()
        for start, end in [offsets[token]]
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["start", "end", "block", "kind", "class", "dialogue"])


def _with_neighbours(asked: pd.DataFrame, whole: Window, kinds: Kinds) -> pd.DataFrame:
    """Add which tokens are hidden and stand beside them, by id."""
    ids = np.append(whole.input_ids, -1)
    at = 1 + np.flatnonzero(kinds > KEPT)  # the window begins with a token that is not the text's
    return asked.assign(token=ids[at], before=ids[at - 1], after=ids[at + 1])


def _answers(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batches: Iterable[Any]
) -> pd.DataFrame:
    """Ask a model: loss in bits, whether it was right, its best guesses; a row an asked token."""
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
    return pd.DataFrame(
        {
            "bits": bits.double().numpy(),
            "right": (guesses[:, 0] == targets).numpy(),
            "guesses": [
                tuple((names[token], share) for token, share in zip(*row, strict=True))
                for row in zip(guesses.tolist(), shares.tolist(), strict=True)
            ],
        }
    )


def _name(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Write a token; one that is a part of a character goes by its number."""
    text = str(tokenizer.decode([token]))
    return f"#{token}" if "\ufffd" in text or not text else text


def recovery(context: EvalContext) -> list[Row]:
    """Loss and accuracy at the masks of epoch 0 by source, and of 武侠 by stratum.

    A stratum is a single token, a span of 3, 4 or 5, a class of word, dialogue or narration. Spans
    also count whole. Beside the accuracies stand those of the commonest token (`unigram`) and of
    the commonest between the two true neighbours in the training text (`trigram`).
    """
    rows = []
    for source in ("wuxia", "general"):
        tokens = _tokens(context, source)
        rows += [
            _row(context, tokens, "masked_loss", "nats/masked token", source, "nats"),
            _row(context, tokens, "masked_accuracy", "share of masked tokens", source, "right"),
        ]
        if source == "general" or tokens.empty:
            continue
        rows[-1] |= _baselines(context.mixture, tokens)
        for name, chosen in _strata(tokens).items():
            rows.append(_row(context, chosen, f"masked_accuracy, {name}", "share", source, "right"))
            rows[-1] |= {side: float(chosen[side].mean()) for side in ("unigram", "trigram")}
        for length in SPANS:
            spans = tokens[tokens["length"] == length].groupby(["document", "block"])
            whole = spans.agg(base_right=("base_right", "min"), tuned_right=("tuned_right", "min"))
            name = f"whole_spans, span of {length}"
            rows.append(_row(context, whole.reset_index(), name, "share", source, "right"))
    return rows


def _tokens(context: EvalContext, source: str) -> pd.DataFrame:
    """X-ray the held-out documents of a source: a row a masked token."""
    parts = []
    documents = context.documents(source, VALIDATION)
    for chosen in context.within_budget("documents masked", documents, AT_ONCE, 0.08):
        try:
            seen = xray(
                context.model, context.tokenizer, context.mixture.texts(chosen),
                SpanMasker(seed=context.seed), key=chosen[0] << 20,
                window=context.config.data.max_length, batch_size=context.batch_size,
            ).tokens  # fmt: skip
        except DataError:  # so short that no token is masked
            continue
        seen["document"] = np.array(chosen)[seen["text"]]
        seen["length"] = seen.groupby(["text", "block"])["block"].transform("size")
        for side in ("base", "tuned"):
            seen[f"{side}_nats"] = seen[f"{side}_bits"] * np.log(2)
        parts.append(seen.drop(columns=["base_guesses", "tuned_guesses"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"document": []})


def _strata(tokens: pd.DataFrame) -> dict[str, pd.DataFrame]:
    spans = {f"span of {n}": (tokens["kind"] != SINGLE) & (tokens["length"] == n) for n in SPANS}
    kinds = {name: tokens["class"] == name for name in CLASSES}
    flags = {"single": tokens["kind"] == SINGLE, **spans, **kinds}
    flags |= {"dialogue": tokens["dialogue"], "narration": ~tokens["dialogue"]}
    return {name: tokens[flag] for name, flag in flags.items() if flag.any()}


def _row(
    context: EvalContext, tokens: pd.DataFrame, name: str, unit: str, source: str, value: str
) -> Row:
    """Compare base and tuned by document."""
    metric = Metric(name, unit, source, ratio("sum", "size"))
    base, tuned = (
        tokens.groupby("document")[f"{side}_{value}"].agg(["sum", "size"])
        if len(tokens)
        else tokens
        for side in ("base", "tuned")
    )
    return compare(metric, base, tuned, len(base), context.seed)


def _baselines(mixture: Mixture, tokens: pd.DataFrame) -> dict[str, float]:
    """Add whether the two baselines are right at each masked token, and give their accuracy."""
    size = int(mixture.tokens.max()) + 2
    asked = _pair(tokens["before"].to_numpy(np.int64), tokens["after"].to_numpy(np.int64), size)
    wanted, counts, found = np.unique(asked), np.zeros(size, np.int64), []
    for ids in _training_tokens(mixture):
        counts += np.bincount(ids[ids >= 0], minlength=size)
        pairs = _pair(ids[:-2], ids[2:], size)
        known = np.isin(pairs, wanted) & (ids[1:-1] >= 0)
        found.append(np.stack([pairs[known], ids[1:-1][known]], axis=1))
    between, times = np.unique(np.concatenate(found), axis=0, return_counts=True)
    guesses = dict(between[np.argsort(times, kind="stable")].tolist())  # the commonest comes last
    tokens["unigram"] = tokens["token"] == counts.argmax()
    tokens["trigram"] = tokens["token"] == [guesses.get(pair, -1) for pair in asked.tolist()]
    return {side: float(tokens[side].mean()) for side in ("unigram", "trigram")}


def _pair(before: Tokens, after: Tokens, size: int) -> Tokens:
    """Give each pair of neighbours a number of its own; -1 stands for none."""
    return (before + 1) * size + after + 1


def _training_tokens(mixture: Mixture) -> Iterator[Tokens]:
    """Read the novels that were trained on, about a million tokens at a time, -1 between pieces."""
    windows = mixture.windows
    train = windows[(windows["split"] == TRAIN) & (windows["source"] == "wuxia")]
    pieces: list[Tokens] = []
    for start, end in zip(train["start"], train["end"], strict=True):
        pieces += [mixture.tokens[start:end].astype(np.int64), np.array([-1])]
        if len(pieces) >= PIECES:
            yield np.concatenate(pieces)
            pieces.clear()
    yield np.concatenate([*pieces, np.array([-1, -1, -1])])
