"""The mask X-ray: what the model answers where a token is hidden, base and tuned side by side."""

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
STRATA = {"": [SINGLE, SPAN], ", single": [SINGLE], ", span": [SPAN]}  # of the masked tokens
OPENINGS = 12
WHOLE_SENTENCES = re.compile(r".{,180}[。！？”」\n]|.{,180}", re.DOTALL)  # of an opening
RECOVERED = ["document", "kind", "base_bits", "tuned_bits", "base_right", "tuned_right"]


class XRay(NamedTuple):
    """The masked tokens of some texts, and what each model predicted there.

    `tokens` has a row a masked token: `text` (which of `texts`), `[start, end)` in its characters,
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
        order = [*CLASSES[::-1], "dialogue", "narration"]
        kinds = [pd.Categorical(of, order) for of in (self.tokens["class"], speech)]
        groups = pd.concat([self.tokens.assign(of=of) for of in kinds]).groupby("of", observed=True)
        names = [f"{model} {name}" for name in ("bits", "right") for model in self.models]
        means = {name: (name.replace(" ", "_"), "mean") for name in names}
        return groups.agg(tokens=("text", "size"), **means).reset_index(names="")

    def spans(self) -> pd.DataFrame:
        """Spans by what tuning did to them, a row each: most helped first.

        Columns: the span in 【】 among its neighbours, bits a token of base and tuned, the change.
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
    """Predict the masked tokens of texts, as in training; with an adapter, without it too.

    The first text is masked as `show_masks` masks it with the same `masker` and `key`, as long as
    it is no longer than a `window` of tokens; the next has the next key. `model` is in evaluation
    mode; a forward pass has `tokens`, or those of one window. Raises `DataError` where no token is
    masked.
    """
    masker, mask_id = masker or SpanMasker(), _mask_id(model, tokenizer)
    tables: list[pd.DataFrame] = []
    rows: list[Scored] = []
    for number, text in enumerate(texts):
        whole, offsets = Encoder(tokenizer, Segmenter()).passage(text)
        drawn = []
        for start in range(0, len(whole.input_ids), window):
            ids = whole.input_ids[start : start + window]
            kinds = masker.kinds(np.arange(len(ids))[None] > 0, [key + len(rows)])[0]
            hidden, labels = np.where(kinds, mask_id, ids), np.where(kinds, ids, IGNORE_INDEX)
            rows.append((number, hidden, labels))
            drawn.append(kinds)
        tables.append(_masked_tokens(text, offsets, np.concatenate(drawn)[1:]).assign(text=number))
    if not any(map(len, tables)):
        raise DataError("xray: no token is masked; the texts are too short for the mask ratio")
    table = pd.concat(tables, ignore_index=True)
    models = ("base", "tuned") if hasattr(model, "peft_config") else ("base",)
    name_of = functools.cache(functools.partial(_name, tokenizer))
    for name in models:
        with model.disable_adapter() if name != models[-1] else nullcontext():
            answers = _answers(predictions(model, rows, tokens or window), name_of)
        table = table.join(answers.add_prefix(f"{name}_"))
    return XRay(tuple(texts), table, models)


def _mask_id(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Choose the row of the mask token: the one that the adapter trained, if it trained one."""
    adapter = getattr(model, "peft_config", {}).get("default")
    trained = getattr(adapter, "trainable_token_indices", None)
    return int(trained[0]) if trained else mask_token_id(tokenizer, model.config.vocab_size)


def _masked_tokens(text: str, offsets: Sequence[tuple[int, int]], kinds: Kinds) -> pd.DataFrame:
    """Describe the masked tokens of a text, a row each, as in `XRay.tokens`.

    `offsets` and `kinds` have a row a token of the text, without the one that starts it.
    """
    masked = kinds > 0
    blocks = np.cumsum(np.diff(masked, prepend=False))  # a number for each run of masked tokens
    table = pd.DataFrame(offsets, columns=["start", "end"]).assign(block=blocks, kind=kinds)[masked]
    spans = [slice(*span) for span in table[["start", "end"]].to_numpy()]
    strengths, speech = classes(text, Segmenter()), dialogue(text)
    strongest = [CLASSES[strengths[span].max()] for span in spans]
    return table.assign(**{"class": strongest, "dialogue": [speech[span].all() for span in spans]})


def _answers(predicted: Iterable[Prediction], name_of: Callable[[int], str]) -> pd.DataFrame:
    """Give loss in bits, whether the best guess was right, and guesses; a row a masked token."""
    parts = []
    for _, logits, targets in predicted:
        log2 = logits.log_softmax(dim=-1).div_(np.log(2))  # (N, V)
        best = log2.topk(5, dim=-1)  # (N, 5)
        guesses = zip(best.indices.tolist(), best.values.exp2().tolist(), strict=True)
        answers = {
            "bits": -log2.gather(1, targets[:, None])[:, 0].double().cpu().numpy(),
            "right": (best.indices[:, 0] == targets).cpu().numpy(),
            "guesses": [[*zip(map(name_of, row), shares, strict=True)] for row, shares in guesses],
        }
        parts.append(pd.DataFrame(answers))
    return pd.concat(parts, ignore_index=True)


def _name(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Write a token; one that is a part of a character goes by its number."""
    text = str(tokenizer.decode([token]))
    return f"#{token}" if "\ufffd" in text or not text else text


def recovery(context: EvalContext) -> list[Row]:
    """Loss and accuracy at the masks of epoch 0 by source, and of 武侠 at singles and in spans."""
    rows = []
    for source in ("wuxia", "general"):
        tokens = _held_out_tokens(context, source)
        nats = {f"{side}_nats": tokens[f"{side}_bits"] * np.log(2) for side in ("base", "tuned")}
        loss = Metric("masked_loss", "nats/masked token", source, MEAN)
        rows.append(_row(loss, "nats", tokens.assign(**nats), context.seed))
        for name in STRATA if source == "wuxia" else [""]:
            chosen = tokens[tokens["kind"].isin(STRATA[name])]
            accuracy = Metric(f"masked_accuracy{name}", "share of masked tokens", source, MEAN)
            rows.append(_row(accuracy, "right", chosen, context.seed))
    return rows


def shown_passage(context: EvalContext) -> dict[str, Any]:
    """X-ray the openings of held-out chapters; give the one where tuning found most tokens more.

    Returns
    -------
    `text`, its `tokens` as in `XRay.tokens`, and `of` how many openings it was chosen; nothing
    where none is long enough for a mask.
    """
    documents = context.documents("wuxia", VALIDATION, limit=OPENINGS)
    openings = [WHOLE_SENTENCES.match(text) for text in context.mixture.texts(documents)]
    texts = [opening.group() for opening in openings if opening]
    bounds = {"window": context.config.data.max_length, "tokens": context.pass_tokens}
    masker = SpanMasker(seed=context.seed)
    with suppress(DataError):
        tokens = xray(context.model, context.tokenizer, texts, masker, **bounds).tokens
        gain = tokens["tuned_right"].astype(int) - tokens["base_right"]
        best = int(gain.groupby(tokens["text"]).sum().idxmax())
        rows = tokens[tokens["text"] == best].assign(text=0).to_dict("records")
        return {"text": texts[best], "tokens": rows, "of": len(texts)}
    return {}


def _held_out_tokens(context: EvalContext, source: str) -> pd.DataFrame:
    """X-ray the held-out documents of a source: a row a masked token."""
    parts = []
    documents = context.documents(source, VALIDATION)
    masker, window = SpanMasker(seed=context.seed), context.config.data.max_length
    for chosen in context.within_budget("documents masked", documents, 8, 0.08):
        texts, key = context.mixture.texts(chosen), chosen[0] << 20
        with suppress(DataError):  # so short that no token is masked
            both = context.model, context.tokenizer
            bounds = {"window": window, "tokens": context.pass_tokens}
            seen = xray(*both, texts, masker, key, **bounds).tokens
            parts.append(seen.assign(document=np.array(chosen)[seen["text"]])[RECOVERED])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=RECOVERED)


def _row(metric: Metric, value: str, tokens: pd.DataFrame, seed: int) -> Row:
    """Compare base and tuned by document."""
    documents = tokens.groupby("document")
    base, tuned = (documents[f"{side}_{value}"].agg(["sum", "count"]) for side in ("base", "tuned"))
    return compare(metric, base, tuned, seed)
