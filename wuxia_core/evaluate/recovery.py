"""The mask X-ray: what base and tuned predict where a token is masked, loss and accuracy there."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
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

MEAN = ratio("sum", "count")
# What a metric's name gets behind it, and the kinds of masked tokens that the row is measured over.
STRATA = {"": [SINGLE, SPAN], ", single": [SINGLE], ", span": [SPAN]}
OPENINGS = 12  # chapters of which one is shown
# The first 180 characters of a text, up to the last end of a sentence where there is one.
WHOLE_SENTENCES = re.compile(r".{,180}[。！？”」\n]|.{,180}", re.DOTALL)
RECOVERED = ["document", "kind", "base_bits", "tuned_bits", "base_right", "tuned_right"]


class XRay(NamedTuple):
    """The masked tokens of some texts, and what each model predicted there.

    `tokens` has a row a masked token: `text` (its number in `texts`), `[start, end)` in the text's
    characters, `block` (one number for masked tokens that stand together), `kind` (1 single, 2
    span), `class` (one of `CLASSES`), `dialogue` (bool); and for each of `models`, "base" and
    "tuned", a `base_bits` (loss), `base_right` (whether the first guess is the token) and
    `base_guesses` (pairs of a token and its probability, best first).
    """

    texts: tuple[str, ...]
    tokens: pd.DataFrame
    models: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """Average loss in bits and accuracy, by class of token, and in dialogue and narration.

        Returns a row a class: its name (column ""), the number of `tokens`, and `base bits`,
        `base right` and so on.
        """
        speech = self.tokens["dialogue"].map({True: "dialogue", False: "narration"})
        order = [*CLASSES[::-1], "dialogue", "narration"]
        columns = [pd.Categorical(column, order) for column in (self.tokens["class"], speech)]
        # Each token twice: once by its class, once by who speaks.
        twice = pd.concat([self.tokens.assign(group=column) for column in columns])
        groups = twice.groupby("group", observed=True)
        names = [f"{model} {name}" for name in ("bits", "right") for model in self.models]
        means = {name: (name.replace(" ", "_"), "mean") for name in names}
        return groups.agg(tokens=("text", "size"), **means).reset_index(names="")

    def spans(self) -> pd.DataFrame:
        """List the masked spans, those first whose loss fell most by tuning.

        Returns a row a span: `span`, the text in 【】 with 20 characters on either side; `base` and
        `tuned`, bits a token; `change`, tuned less base. Of a base alone there is no `tuned` and no
        `change`, and the spans come by `base`.
        """
        tokens = self.tokens[self.tokens["kind"] == SPAN]
        columns = {"start": "min", "end": "max", **{f"{name}_bits": "mean" for name in self.models}}
        rows = []
        for (number, _), row in tokens.groupby(["text", "block"]).agg(columns).iterrows():
            start, end = int(row["start"]), int(row["end"])
            rows.append((in_brackets(self.texts[number], start, end - start), *row[2:]))
        table = pd.DataFrame(rows, columns=["span", *self.models])
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
    tokens: int | None = None,
) -> XRay:
    """Predict the masked tokens of texts, as in training: with the base, and with an adapter too.

    Each text is cut into windows of `window` tokens. The masks of the first window are drawn by
    `key`, as `show_masks` draws them, those of the next by the next key. `model` is in evaluation
    mode; a forward pass has at most `tokens`, by default one window. Raises `DataError` where no
    token is masked.
    """
    masker, mask_id = masker or SpanMasker(), _mask_id(model, tokenizer)
    tables: list[pd.DataFrame] = []
    rows: list[Scored] = []  # a row a window, of all texts
    for number, text in enumerate(texts):
        encoded, offsets = Encoder(tokenizer, Segmenter()).passage(text)
        masks = []  # kinds of the tokens of each window
        for start in range(0, len(encoded.input_ids), window):
            ids = encoded.input_ids[start : start + window]
            kinds = masker.kinds(np.arange(len(ids))[None] > 0, [key + len(rows)])[0]
            masked, labels = np.where(kinds, mask_id, ids), np.where(kinds, ids, IGNORE_INDEX)
            rows.append((number, masked, labels))
            masks.append(kinds)
        tables.append(_masked_tokens(text, offsets, np.concatenate(masks)[1:]).assign(text=number))
    if not any(map(len, tables)):
        raise DataError("xray: no token is masked; the texts are too short for the mask ratio")
    table = pd.concat(tables, ignore_index=True)
    models = ("base", "tuned") if hasattr(model, "peft_config") else ("base",)
    write_token = functools.cache(functools.partial(_write_token, tokenizer))
    for name in models:
        with model.disable_adapter() if name != models[-1] else nullcontext():
            answers = _answers(predictions(model, rows, tokens or window), write_token)
        table = table.join(answers.add_prefix(f"{name}_"))
    return XRay(tuple(texts), table, models)


def _mask_id(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Choose the id of the mask token: the one that the adapter trained, else the base's own."""
    adapter = getattr(model, "peft_config", {}).get("default")
    trained = getattr(adapter, "trainable_token_indices", None)
    return int(trained[0]) if trained else mask_token_id(tokenizer, model.config.vocab_size)


def _masked_tokens(text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds) -> pd.DataFrame:
    """Describe the masked tokens of a text: a row each, with the columns of `XRay.tokens`.

    `offsets`, character positions `[start, end)`, and `kinds` have an entry for each token of the
    text, without the token that stands before it. `text` and what models predict is left out.
    """
    masked = kinds > 0
    blocks = np.cumsum(np.diff(masked, prepend=False))  # goes up where a run of masks begins, ends
    table = pd.DataFrame(offsets, columns=["start", "end"]).assign(block=blocks, kind=kinds)[masked]
    spans = [slice(*span) for span in table[["start", "end"]].to_numpy()]
    ranks, speech = classes(text, Segmenter()), dialogue(text)  # of each character
    top_class = [CLASSES[ranks[span].max()] for span in spans]
    return table.assign(**{"class": top_class, "dialogue": [speech[span].all() for span in spans]})


def _answers(batches: Iterable[Prediction], write_token: Callable[[int], str]) -> pd.DataFrame:
    """Tabulate what a model predicts at masked tokens, a row each: `bits`, `right` and `guesses`.

    They are the columns of `XRay.tokens`, without the model's name in front.
    """
    parts = []
    for _, logits, targets in batches:
        log2 = logits.log_softmax(dim=-1).div_(np.log(2))  # (N, V)
        best = log2.topk(5, dim=-1)  # (N, 5)
        guesses = zip(best.indices.tolist(), best.values.exp2().tolist(), strict=True)
        answers = {
            "bits": -log2.gather(1, targets[:, None])[:, 0].double().cpu().numpy(),
            "right": (best.indices[:, 0] == targets).cpu().numpy(),
            "guesses": [[*zip(map(write_token, row), p, strict=True)] for row, p in guesses],
        }
        parts.append(pd.DataFrame(answers))
    return pd.concat(parts, ignore_index=True)


def _write_token(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Write a token as text, one that is only a part of a character as its number: `#4711`."""
    text = str(tokenizer.decode([token]))
    return f"#{token}" if "\ufffd" in text or not text else text


def score_recovery(context: EvalContext) -> list[Row]:
    """Measure loss and accuracy at masked tokens of held-out documents, in rows of the scorecard.

    Each is measured for 武侠 and for general text, accuracy on 武侠 also at singles and in spans.
    """
    rows = []
    for source in ("wuxia", "general"):
        tokens = _held_out_tokens(context, source)
        nats = {f"{name}_nats": tokens[f"{name}_bits"] * np.log(2) for name in ("base", "tuned")}
        loss = Metric("masked_loss", "nats/masked token", source, MEAN)
        rows.append(_row(loss, "nats", tokens.assign(**nats), context.seed))
        for suffix in STRATA if source == "wuxia" else [""]:
            stratum = tokens[tokens["kind"].isin(STRATA[suffix])]
            accuracy = Metric(f"masked_accuracy{suffix}", "share of masked tokens", source, MEAN)
            rows.append(_row(accuracy, "right", stratum, context.seed))
    return rows


def shown_passage(context: EvalContext) -> dict[str, Any]:
    """X-ray the openings of twelve held-out chapters; choose the one where tuning helped most.

    That is where the tuned model has the most more right answers than the base.

    Returns
    -------
    `text`, the opening; `tokens`, the rows of `XRay.tokens`, with `text` 0; `of`, the number of
    openings to choose from. Empty where all openings are too short for a mask.
    """
    documents = context.documents("wuxia", VALIDATION, limit=OPENINGS)
    openings = [WHOLE_SENTENCES.match(text) for text in context.mixture.texts(documents)]
    texts = [opening.group() for opening in openings if opening]
    with suppress(DataError):  # all so short that no token is masked
        tokens = _xray_tokens(context, texts, 0)
        gain = tokens["tuned_right"].astype(int) - tokens["base_right"]
        best = int(gain.groupby(tokens["text"]).sum().idxmax())
        rows = tokens[tokens["text"] == best].assign(text=0).to_dict("records")
        return {"text": texts[best], "tokens": rows, "of": len(texts)}
    return {}


def _held_out_tokens(context: EvalContext, source: str) -> pd.DataFrame:
    """X-ray the held-out documents of a source: a row a masked token, the columns `RECOVERED`."""
    parts = []
    documents = context.documents(source, VALIDATION)
    for chunk in context.within_budget("documents masked", documents, 8, 0.08):
        texts, key = context.mixture.texts(chunk), chunk[0] << 20  # a window's key is its own
        with suppress(DataError):  # all so short that no token is masked
            tokens = _xray_tokens(context, texts, key)
            parts.append(tokens.assign(document=np.array(chunk)[tokens["text"]])[RECOVERED])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=RECOVERED)


def _xray_tokens(context: EvalContext, texts: Sequence[str], key: int) -> pd.DataFrame:
    """X-ray texts as `xray` does, with what an evaluation works with; return `XRay.tokens`."""
    masker = SpanMasker(seed=context.seed)
    bounds = {"window": context.config.data.max_length, "tokens": context.pass_tokens}
    return xray(context.model, context.tokenizer, texts, masker, key, **bounds).tokens


def _row(metric: Metric, column: str, tokens: pd.DataFrame, seed: int) -> Row:
    """Compare the columns `base_…` and `tuned_…` of masked tokens, with documents resampled."""
    documents = tokens.groupby("document")
    base, tuned = (documents[f"{n}_{column}"].agg(["sum", "count"]) for n in ("base", "tuned"))
    return compare(metric, base, tuned, seed)
