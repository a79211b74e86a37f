"""The mask X-ray: what base and tuned predict for masked tokens, with what loss and accuracy."""

import functools
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from wuxia_core.corpus import CLASSES, Segmenter, classes, dialogue
from wuxia_core.errors import DataError
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import in_brackets
from wuxia_core.evaluate.scoring import Prediction, Scored, predictions
from wuxia_core.evaluate.statistics import Metric, Row, compare, ratio
from wuxia_core.masking import IGNORE_INDEX, SINGLE, SPAN, Kinds, SpanMasker
from wuxia_core.mixing import VALIDATION, Encoder
from wuxia_core.model import mask_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEAN = ratio("sum", "count")  # over all masked tokens, from sums and counts by document
# Accuracy is measured as `masked_accuracy` with each of these endings, at tokens of these kinds.
STRATA = {"": [SINGLE, SPAN], ", single": [SINGLE], ", span": [SPAN]}
OPENINGS = 12  # chapters whose openings are X-rayed, at most; one opening is shown
# Matches the beginning of a text: up to the last end of a sentence among its first 181 characters,
# or its first 180 characters if no sentence ends there.
WHOLE_SENTENCES = re.compile(r".{,180}[。！？”」\n]|.{,180}", re.DOTALL)
# The columns of a table of masked tokens from which metrics are computed.
RECOVERED = ["document", "kind", "base_bits", "tuned_bits", "base_right", "tuned_right"]


class XRay(NamedTuple):
    """The masked tokens of `texts`, and what each of `models`, "base" and maybe "tuned", predicted.

    `tokens` has a row for each masked token. Its columns are `text` (the text's index in `texts`),
    `start` and `end` (the token's characters are `[start, end)` of the text), `block` (a number
    that the masked tokens of one stretch share), `kind` (1 single, 2 span), `class` (the strongest
    of `CLASSES` among its characters) and `dialogue` (whether all of them stand in quotation
    marks). For the base there are also `base_bits` (the loss), `base_right` (whether the first
    guess is the token) and `base_guesses` (five pairs of a token's text and its probability, best
    first); for the tuned model there are `tuned_bits` and so on.
    """

    texts: tuple[str, ...]
    tokens: pd.DataFrame
    models: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Average loss in bits and accuracy, by class of token, and in dialogue and narration.

        Returns a table with a row for each group of tokens: the classes from `CLASSES`, strongest
        first, then "dialogue" and "narration"; a group without a token has no row. Its columns are
        "" (the group's name), `tokens` (how many the group has), `base bits` and `tuned bits` (mean
        loss), `base right` and `tuned right` (accuracy, 0 to 1); those of a model that is not in
        `models` are missing.
        """
        speech = self.tokens["dialogue"].map({True: "dialogue", False: "narration"})
        order = [*CLASSES[::-1], "dialogue", "narration"]
        columns = [pd.Categorical(column, order) for column in (self.tokens["class"], speech)]
        # Each token twice: once in its class, once in dialogue or narration.
        twice = pd.concat([self.tokens.assign(group=column) for column in columns])
        groups = twice.groupby("group", observed=True)
        names = [f"{model} {name}" for name in ("bits", "right") for model in self.models]
        # For each column of the summary: the column of `tokens` that is averaged.
        means = {name: (name.replace(" ", "_"), "mean") for name in names}
        return groups.agg(tokens=("text", "size"), **means).reset_index(names="")

    def spans(self) -> pd.DataFrame:
        """List the masked spans; the one whose loss tuning lowered most comes first.

        Returns a table with a row for each span: `span`, the text in 【】 with at most 20
        characters on either side; `base` and `tuned`, the mean loss in bits a token; `change`,
        tuned less base. If there is only a base, there is neither `tuned` nor `change`, and the
        span of the lowest loss comes first.
        """
        tokens = self.tokens[self.tokens["kind"] == SPAN]
        columns = {"start": "min", "end": "max", **{f"{name}_bits": "mean" for name in self.models}}
        rows = []
        for (number, _), row in tokens.groupby(["text", "block"]).agg(columns).iterrows():
            start, end = int(row["start"]), int(row["end"])
            # After `start` and `end` come the mean bits of each model, in the order of `models`.
            rows.append((in_brackets(self.texts[number], start, end - start), *row[2:]))
        table = pd.DataFrame(rows, columns=["span", *self.models])
        if len(self.models) > 1:
            table["change"] = table["tuned"] - table["base"]
        # The last column is "change", or "base" if that is the only model.
        return table.sort_values(table.columns[-1], kind="stable", ignore_index=True)


def xray(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    masker: SpanMasker | None = None,
    key: int = 0,
    *,
    window: int = 256,
    tokens: int | None = None,
) -> XRay:
    """Mask tokens of `texts`, and let the base, and an adapter on it, predict them: an `XRay`.

    Each text is cut into windows of `window` tokens. `masker` (None: `SpanMasker()`) masks the
    first window by `key` as `show_masks` does, the next one, of any text, by `key` + 1. `model`
    must be in evaluation mode. A pass has at most `tokens` tokens (None: `window`), or one window.
    Raises `DataError` if no token is masked, `ConfigError` if there is no mask token to use.
    """
    masker, mask_id = masker or SpanMasker(), _mask_id(model, tokenizer)
    tables: list[pd.DataFrame] = []
    rows: list[Scored] = []  # a row a window, of all texts
    for number, text in enumerate(texts):
        encoded, offsets = Encoder(tokenizer, Segmenter()).passage(text)
        masks = []  # kinds of each window's tokens, 0: not masked; the text's first: <|endoftext|>
        for start in range(0, len(encoded.input_ids), window):
            ids = encoded.input_ids[start : start + window]
            kinds = masker.kinds(np.arange(len(ids))[None] > 0, [key + len(rows)])[0]
            inputs, labels = np.where(kinds, mask_id, ids), np.where(kinds, ids, IGNORE_INDEX)
            rows.append((number, inputs, labels))
            masks.append(kinds)
        tables.append(_masked_tokens(text, offsets, np.concatenate(masks)[1:]).assign(text=number))
    if not any(map(len, tables)):
        raise DataError("xray: no token is masked; the texts are too short for the mask ratio")
    table = pd.concat(tables, ignore_index=True)
    models = ("base", "tuned") if hasattr(model, "peft_config") else ("base",)
    for name in models:
        mode = model.disable_adapter() if name != models[-1] else nullcontext()  # last: as is
        with mode:
            predicted = _predicted(predictions(model, rows, tokens or window), tokenizer)
        table = table.join(predicted.add_prefix(f"{name}_"))
    return XRay(tuple(texts), table, models)


def _mask_id(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the mask token.

    It is the token whose embedding the adapter trained; if there is no such adapter, it is the
    token that `mask_token_id` chooses for the base. Raises `ConfigError` if the base's embedding
    table has no spare row for that, or fewer rows than the tokenizer has tokens.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    trained = getattr(adapter, "trainable_token_indices", None)
    return int(trained[0]) if trained else mask_token_id(tokenizer, model.config.vocab_size)


def _masked_tokens(text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds) -> pd.DataFrame:
    """Tabulate the masked tokens of a text, a row each, in the columns of `XRay.tokens`.

    The column `text` and the columns of the models are left out. `offsets` (`[start, end)` in
    characters) and `kinds` have an entry for each token of the text, without the `<|endoftext|>`
    before it.
    """
    masked = kinds > 0
    # For each token a number that goes up by 1 where a stretch of masked tokens begins or ends.
    blocks = np.cumsum(np.diff(masked, prepend=False))
    table = pd.DataFrame(offsets, columns=["start", "end"]).assign(block=blocks, kind=kinds)[masked]
    spans = [slice(*span) for span in table[["start", "end"]].to_numpy()]
    ranks, speech = classes(text, Segmenter()), dialogue(text)  # of each character
    strongest = [CLASSES[ranks[span].max()] for span in spans]  # ranks are indices of `CLASSES`
    return table.assign(**{"class": strongest, "dialogue": [speech[span].all() for span in spans]})


def _predicted(batches: Iterable[Prediction], tokenizer: "PreTrainedTokenizerBase") -> pd.DataFrame:
    """Tabulate what a model predicts for masked tokens, a row each: `bits`, `right` and `guesses`.

    These are columns of `XRay.tokens`, without the model's name in front. `batches` must have at
    least one batch.
    """
    show_token = functools.cache(functools.partial(_show_token, tokenizer))
    parts = []
    for _, logits, targets in batches:
        log2 = logits.log_softmax(dim=-1).div_(np.log(2))  # log2 p of each token, (N, V)
        best = log2.topk(5, dim=-1)  # (N, 5)
        guesses = zip(best.indices.tolist(), best.values.exp2().tolist(), strict=True)
        columns = {
            "bits": -log2.gather(1, targets[:, None])[:, 0].double().cpu().numpy(),
            "right": (best.indices[:, 0] == targets).cpu().numpy(),
            # Pairs of a token's text and its probability p.
            "guesses": [[*zip(map(show_token, ids), p, strict=True)] for ids, p in guesses],
        }
        parts.append(pd.DataFrame(columns))
        del logits, log2  # or they would be held during the next forward pass
    return pd.concat(parts, ignore_index=True)


def _show_token(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Return a token's text; if it is empty or only a part of a character, its id: `#4711`."""
    text = str(tokenizer.decode([token]))
    return f"#{token}" if "\ufffd" in text or not text else text


def score_recovery(context: EvalContext) -> list[Row]:
    """Compare base and tuned by loss and accuracy at masked tokens of held-out documents.

    Returns six rows of the scorecard on 武侠 and general text. For 武侠 they are loss, accuracy,
    accuracy at the single masked tokens and accuracy at those in spans; for general text they are
    loss and accuracy.
    """
    rows = []
    for source in ("wuxia", "general"):
        tokens = _held_out_tokens(context, source)
        nats = {f"{name}_nats": tokens[f"{name}_bits"] * np.log(2) for name in ("base", "tuned")}
        loss = Metric("masked_loss", "nats/masked token", source, MEAN)
        rows.append(_row(loss, "nats", tokens.assign(**nats), context.seed))
        suffixes = STRATA if source == "wuxia" else [""]  # "" stands for all masked tokens
        for suffix in suffixes:
            stratum = tokens[tokens["kind"].isin(STRATA[suffix])]
            accuracy = Metric(f"masked_accuracy{suffix}", "share of masked tokens", source, MEAN)
            rows.append(_row(accuracy, "right", stratum, context.seed))
    return rows


def shown_passage(context: EvalContext) -> dict[str, Any]:
    """X-ray the openings of twelve held-out chapters; choose the one where tuning helped most.

    In the chosen opening the number of tokens that the tuned model has right exceeds the base's
    number by most. If several openings tie, the first is chosen. If fewer than twelve chapters are
    held out, all of them are X-rayed.

    Returns
    -------
    A dict: `text`, the opening; `tokens`, its rows of `XRay.tokens` as dicts, each with 0 as its
    `text`; `of`, the number of openings to choose from. The dict is empty if no opening has a
    masked token.
    """
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=OPENINGS))
    texts = [next(WHOLE_SENTENCES.finditer(chapter)).group() for chapter in chapters]
    with suppress(DataError):  # all so short that no token is masked
        tokens = _xray_tokens(context, texts, 0)
        # For each token: 1 if only the tuned model is right, -1 if only the base, else 0.
        gains = tokens["tuned_right"].astype(int) - tokens["base_right"]
        best = int(gains.groupby(tokens["text"]).sum().idxmax())
        rows = tokens[tokens["text"] == best].assign(text=0).to_dict("records")
        return {"text": texts[best], "tokens": rows, "of": len(texts)}
    return {}


def _held_out_tokens(context: EvalContext, source: str) -> pd.DataFrame:
    """X-ray as many held-out documents of a source as time allows.

    Returns a table with the columns `RECOVERED`, a row for each masked token; `document` is the
    document's number in the mixture.
    """
    parts = []
    documents = context.documents(source, VALIDATION)
    # 8 at a time, for at most 8 % of the evaluation's minutes
    for chunk in context.within_budget("documents masked", documents, 8, 0.08):
        # `key` is that of the first window; each further one counts on by 1. A million keys lie
        # between two documents, so no two chunks use the same key.
        texts, key = context.mixture.texts(chunk), chunk[0] << 20
        with suppress(DataError):  # all so short that no token is masked
            tokens = _xray_tokens(context, texts, key)
            parts.append(tokens.assign(document=np.array(chunk)[tokens["text"]])[RECOVERED])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=RECOVERED)


def _xray_tokens(context: EvalContext, texts: Sequence[str], key: int) -> pd.DataFrame:
    """X-ray texts with an evaluation's model, seed, windows and tokens a pass: `XRay.tokens`.

    `key` is the key of the first window, as in `xray`. Raises `DataError` if no token is masked.
    """
    # With the default ratios and lengths, not those of the run, so that runs can be compared.
    masker = SpanMasker(seed=context.seed)
    bounds = {"window": context.config.data.max_length, "tokens": context.pass_tokens}
    return xray(context.model, context.tokenizer, texts, masker, key, **bounds).tokens


def _row(metric: Metric, column: str, tokens: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned by the mean of a column of masked tokens: the row of the scorecard.

    `column` is a name without the model's: "bits" stands for the columns `base_bits` and
    `tuned_bits` of `tokens`. The items that are resampled are documents.
    """
    groups = tokens.groupby("document")
    # A row for each document: the sum over its masked tokens, and their number.
    base, tuned = (groups[f"{name}_{column}"].agg(["sum", "count"]) for name in ("base", "tuned"))
    return compare(metric, base, tuned, seed)
