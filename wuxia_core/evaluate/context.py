"""`EvalContext`: the model with its adapter, the mixture, the settings and the time to evaluate."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pandas as pd
from tqdm import tqdm

from wuxia_core.config import Config
from wuxia_core.messages import messages
from wuxia_core.mixing import Mixture
from wuxia_core.model import LOGITS
from wuxia_core.write import continue_prompts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")
Tables = tuple[pd.DataFrame, pd.DataFrame]  # one of the base, one of the tuned model
# Endings of the names of the layers whose outputs are the keys and values of a token; `generate`
# keeps these for each token.
CACHED = ("k_proj", "v_proj")
HUMAN_CHARACTERS = 300_000  # of one source: enough to measure a style by
logger = logging.getLogger(__name__)


class EvalContext(NamedTuple):
    """An adapter on its base, the mixture that it was trained on, and the run's settings.

    `model` is in evaluation mode; inside `with model.disable_adapter():` it is the base.
    """

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    mixture: Mixture
    config: Config

    @property
    def seed(self) -> int:
        """Seed of the run; everything that an evaluation draws at random depends only on it."""
        return self.config.training.seed

    @property
    def pass_tokens(self) -> int:
        """Most tokens of a forward pass: batch size × `data.max_length`, as in the training.

        So many tokens fitted into memory in the training.
        """
        return self.config.training.per_device_train_batch_size * self.config.data.max_length

    def base_and_tuned(self, work: Callable[[], T]) -> tuple[T, T]:
        """Call `work` with the adapter off, then with it on; return both results in this order."""
        with self.model.disable_adapter():
            base = work()
        return base, work()

    def measure_both(self, work: Callable[[T], pd.DataFrame], chunks: Iterable[T]) -> Tables:
        """Call `work` on each of `chunks` with the base, then with the tuned model.

        Returns two tables: all rows that the base gave, and all rows that the tuned model gave. If
        there is no chunk, both tables are empty and have no columns.
        """
        tables = [self.base_and_tuned(partial(work, chunk)) for chunk in chunks]
        if not tables:
            return pd.DataFrame(), pd.DataFrame()
        base, tuned = (pd.concat(side, ignore_index=True) for side in zip(*tables, strict=True))
        return base, tuned

    def documents(self, source: str, *splits: str, limit: int | None = None) -> list[int]:
        """Draw documents of `source` in any of `splits`; return their numbers in the mixture.

        At most `limit` documents are drawn (None: `evaluation.max_documents`). They come in a
        random order that depends only on the seed.
        """
        limit = limit or self.config.evaluation.max_documents
        return self.mixture.draw(self.seed, source, *splits)[:limit]

    def human_texts(self, source: str, *splits: str) -> list[str]:
        """Draw whole documents until they have 300,000 characters in all; return their texts.

        If a source has fewer characters in these splits, all its documents there are returned.
        """
        outline = self.mixture.outline
        sizes = outline.loc[self.documents(source, *splits, limit=len(outline)), "characters"]
        characters_before = sizes.cumsum().shift(fill_value=0)  # of all documents drawn earlier
        return self.mixture.texts(sizes.index[characters_before < HUMAN_CHARACTERS].tolist())

    def continue_rows(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continue rows of token ids; return for each row the text that was generated behind it.

        `settings` are arguments of `model.generate`, among them `max_new_tokens`. The rows are
        continued in batches. The cache of keys and values of a batch has at most as many bytes as
        `LOGITS` logits in float32 (1 GiB, the bound on the logits of a batch elsewhere), unless a
        single row needs more.
        """
        layers = self.model.named_modules()
        # For each such layer, how many numbers of a token are cached.
        widths = [layer.out_features for name, layer in layers if name.endswith(CACHED)]
        tokens = max(map(len, rows), default=0) + settings["max_new_tokens"]  # of the longest row
        # A model without layers of these names counts as if it cached one number for a token.
        row_bytes = tokens * max(1, sum(widths)) * self.model.dtype.itemsize  # of a row's cache
        size = max(1, 4 * LOGITS // row_bytes)  # rows of a batch
        generate = partial(continue_prompts, self.model, self.tokenizer, settings=settings)
        return [text for n in range(0, len(rows), size) for text in generate(rows[n : n + size])]

    def within_budget(
        self, message: str, items: Sequence[T], size: int, share: float
    ) -> Iterator[Sequence[T]]:
        """Yield batches of `size` items; begin none after `share` of `evaluation.minutes`.

        With a `share` of 0.25 and 20 minutes no batch begins later than 5 minutes after the first
        one. The first batch is always yielded, and all are if `evaluation.minutes` is None. The
        last batch may be smaller. `message` is the key of the progress bar's text in the messages'
        section `[bars]`; it also begins the warning that is logged if items are left over.
        """
        minutes = self.config.evaluation.minutes or float("inf")
        deadline = time.monotonic() + 60 * share * minutes  # seconds
        with tqdm(desc=messages("bars")[message], total=len(items), leave=False) as bar:
            for start in range(0, len(items), size):
                if start and time.monotonic() > deadline:
                    count = f"{start} of {len(items)}"
                    logger.warning("%s: %s within evaluation.minutes %g", message, count, minutes)
                    return
                batch = items[start : start + size]
                yield batch
                bar.update(len(batch))
