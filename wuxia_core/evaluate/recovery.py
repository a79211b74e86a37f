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
# The endings of the names under which accuracy is measured, each with the kinds of its tokens.
STRATA = {"": [SINGLE, SPAN], ", single": [SINGLE], ", span": [SPAN]}
OPENINGS = 12  # of chapters, at most; one of them is shown
# Matches the beginning of a text, at most 181 characters: as far as the last sentence that ends in
# it, or the first 180 if none does.
WHOLE_SENTENCES = re.compile(r".{,180}[。！？”」\n]|.{,180}", re.DOTALL)
# Columns of the masked tokens that metrics are made of.
RECOVERED = ["document", "kind", "base_bits", "tuned_bits", "base_right", "tuned_right"]


class XRay(NamedTuple):
    """The masked tokens of `texts`, and what each of `models`, "base" and maybe "tuned", predicted.

    `tokens` has a row a masked token: `text` (the text's index in `texts`), `[start, end)` in the
    text's characters, `block` (a number that the masked tokens of one stretch share), `kind` (1
    single, 2 span), `class` (the strongest of `CLASSES` among its characters) and `dialogue`
    (whether all of them stand in quotation marks). From the base it has `base_bits` (the loss),
    `base_right` (whether the first guess is the token) and `base_guesses` (five pairs of a token's
    text and its probability, best first); from the tuned model `tuned_bits` and so on.
    """

    texts: tuple[str, ...]
    tokens: pd.DataFrame
    models: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Average loss in bits and accuracy, by class of token, and in dialogue and narration.

        Returns a table, a row a group of tokens: the classes from `CLASSES`, strongest first, then
        "dialogue" and "narration"; a group without a token has no row. Its columns are "" (the
        group's name), `tokens` (their number), `base bits`, `base right` and so on.
        """
        speech = self.tokens["dialogue"].map({True: "dialogue", False: "narration"})
        order = [*CLASSES[::-1], "dialogue", "narration"]
        columns = [pd.Categorical(column, order) for column in (self.tokens["class"], speech)]
        # Each token twice: once in its class, once in dialogue or narration.
        twice = pd.concat([self.tokens.assign(group=column) for column in columns])
        groups = twice.groupby("group", observed=True)
        names = [f"{model} {name}" for name in ("bits", "right") for model in self.models]
        # By column of the summary: the column of `tokens`, and what is made of it.
        means = {name: (name.replace(" ", "_"), "mean") for name in names}
        return groups.agg(tokens=("text", "size"), **means).reset_index(names="")

    def spans(self) -> pd.DataFrame:
        """List the masked spans, those first whose loss fell most by tuning.

        Returns a table, a row a span: `span`, the text in 【】 with at most 20 characters on either
        side; `base` and `tuned`, the mean loss in bits a token; `change`, tuned less base. From a
        base alone there is neither `tuned` nor `change`, and the span of the lowest loss is first.
        """
        tokens = self.tokens[self.tokens["kind"] == SPAN]
        columns = {"start": "min", "end": "max", **{f"{name}_bits": "mean" for name in self.models}}
        rows = []
        for (number, _), row in tokens.groupby(["text", "block"]).agg(columns).iterrows():
            start, end = int(row["start"]), int(row["end"])
            # Behind these two, `row` has the mean bits of each model.
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

    Each text is cut into windows of `window` tokens. `masker`, by default `SpanMasker()`, draws the
    masks of the first by `key`, as `show_masks` does, those of the next, of any text, by `key` + 1.
    `model` must be in evaluation mode. A forward pass has at most `tokens`, by default `window`, or
    one window. Raises `DataError` if no token is masked, and what `mask_token_id` raises.
    """
    masker, mask_id = masker or SpanMasker(), _mask_id(model, tokenizer)
    tables: list[pd.DataFrame] = []
    rows: list[Scored] = []  # a row a window, of all texts
    for number, text in enumerate(texts):
        encoded, offsets = Encoder(tokenizer, Segmenter()).passage(text)
        masks = []  # of each window: the kinds of its tokens, 0 if not masked
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
    """Return the mask token's id: the one whose embedding the adapter trained, else the base's.

    The latter is the choice of `mask_token_id`, which also says what is raised.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    trained = getattr(adapter, "trainable_token_indices", None)
    return int(trained[0]) if trained else mask_token_id(tokenizer, model.config.vocab_size)


def _masked_tokens(text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds) -> pd.DataFrame:
    """Tabulate the masked tokens of a text, a row each, in the columns of `XRay.tokens`.

    The column `text` and those of the models are left out. `offsets`, `[start, end)` in characters,
    and `kinds` have an entry for each token of the text, without the `<|endoftext|>` before it.
    """
    masked = kinds > 0
    # A number that goes up where a stretch of masked tokens begins, and where it ends.
    blocks = np.cumsum(np.diff(masked, prepend=False))
    table = pd.DataFrame(offsets, columns=["start", "end"]).assign(block=blocks, kind=kinds)[masked]
    spans = [slice(*span) for span in table[["start", "end"]].to_numpy()]
    ranks, speech = classes(text, Segmenter()), dialogue(text)  # of each character
    strongest = [CLASSES[ranks[span].max()] for span in spans]  # ranks are indices of `CLASSES`
    return table.assign(**{"class": strongest, "dialogue": [speech[span].all() for span in spans]})


def _predicted(batches: Iterable[Prediction], tokenizer: "PreTrainedTokenizerBase") -> pd.DataFrame:
    """Tabulate what a model predicts for masked tokens, a row each: `bits`, `right` and `guesses`.

    They are the columns of `XRay.tokens`, without the model's name in front. There must be a batch
    at least.
    """
    show_token = functools.cache(functools.partial(_show_token, tokenizer))
    parts = []
    for _, logits, targets in batches:
        log2 = logits.log_softmax(dim=-1).div_(np.log(2))  # (N, V)
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
    """Return a token's text; if it is only a part of a character or empty, its id: `#4711`."""
    text = str(tokenizer.decode([token]))
    return f"#{token}" if "\ufffd" in text or not text else text


def score_recovery(context: EvalContext) -> list[Row]:
    """Compare base and tuned by loss and accuracy at masked tokens of held-out documents.

    Returns the rows of the scorecard: loss and accuracy on 武侠, accuracy there at the single
    masked tokens and at those in spans, then loss and accuracy on general text.
    """
    rows = []
    for source in ("wuxia", "general"):
        tokens = _held_out_tokens(context, source)
        nats = {f"{name}_nats": tokens[f"{name}_bits"] * np.log(2) for name in ("base", "tuned")}
        loss = Metric("masked_loss", "nats/masked token", source, MEAN)
        rows.append(_row(loss, "nats", tokens.assign(**nats), context.seed))
        suffixes = STRATA if source == "wuxia" else [""]  # "": all masked tokens
        for suffix in suffixes:
            stratum = tokens[tokens["kind"].isin(STRATA[suffix])]
            accuracy = Metric(f"masked_accuracy{suffix}", "share of masked tokens", source, MEAN)
            rows.append(_row(accuracy, "right", stratum, context.seed))
    return rows


def shown_passage(context: EvalContext) -> dict[str, Any]:
    """X-ray the openings of twelve held-out chapters; choose the one where tuning helped most.

    That is where the number of tokens that the tuned model has right exceeds the base's by most; of
    several such openings it is the first. If fewer chapters are held out, these are taken.

    Returns
    -------
    A dict: `text`, the opening; `tokens`, its rows of `XRay.tokens` as dicts, each with 0 as its
    `text`; `of`, the number of openings to choose from. It is empty if no opening has a masked
    token.
    """
    chapters = context.mixture.texts(context.documents("wuxia", VALIDATION, limit=OPENINGS))
    texts = [next(WHOLE_SENTENCES.finditer(chapter)).group() for chapter in chapters]
    with suppress(DataError):  # all so short that no token is masked
        tokens = _xray_tokens(context, texts, 0)
        gains = tokens["tuned_right"].astype(int) - tokens["base_right"]
        best = int(gains.groupby(tokens["text"]).sum().idxmax())
        rows = tokens[tokens["text"] == best].assign(text=0).to_dict("records")
        return {"text": texts[best], "tokens": rows, "of": len(texts)}
    return {}


def _held_out_tokens(context: EvalContext, source: str) -> pd.DataFrame:
    """X-ray the held-out documents of a source that time allows.

    Returns a table with the columns `RECOVERED`, a row a masked token; `document` is the document's
    number in the mixture.
    """
    parts = []
    documents = context.documents(source, VALIDATION)
    # 8 at a time, for at most 8 % of the evaluation's minutes
    for chunk in context.within_budget("documents masked", documents, 8, 0.08):
        # Keys of windows are counted on from here, and no two chunks come to the same ones.
        texts, key = context.mixture.texts(chunk), chunk[0] << 20
        with suppress(DataError):  # all so short that no token is masked
            tokens = _xray_tokens(context, texts, key)
            parts.append(tokens.assign(document=np.array(chunk)[tokens["text"]])[RECOVERED])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=RECOVERED)


def _xray_tokens(context: EvalContext, texts: Sequence[str], key: int) -> pd.DataFrame:
    """X-ray texts with an evaluation's model, seed, windows and tokens a pass: `XRay.tokens`.

    `key` is as in `xray`, which also says what is raised.
    """
    masker = SpanMasker(seed=context.seed)  # of the recipe, not of the run, so that runs compare
    bounds = {"window": context.config.data.max_length, "tokens": context.pass_tokens}
    return xray(context.model, context.tokenizer, texts, masker, key, **bounds).tokens


def _row(metric: Metric, column: str, tokens: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned by the mean of a column of masked tokens: the row of the scorecard.

    With `column` "bits", `tokens` has the columns `base_bits` and `tuned_bits`. Documents are
    resampled.
    """
    groups = tokens.groupby("document")
    base, tuned = (groups[f"{name}_{column}"].agg(["sum", "count"]) for name in ("base", "tuned"))
    return compare(metric, base, tuned, seed)
