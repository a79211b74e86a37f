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
Tables = tuple[pd.DataFrame, pd.DataFrame]  # of the base, of the tuned model
CACHED = ("k_proj", "v_proj")  # layers whose output a generation keeps for each token
HUMAN_CHARACTERS = 300_000
logger = logging.getLogger(__name__)


class EvalContext(NamedTuple):
    """An adapter on its base, and the mixture it was trained on."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    mixture: Mixture
    config: Config

    @property
    def seed(self) -> int:
        """Seed of the run; all that an evaluation draws depends only on it."""
        return self.config.training.seed

    @property
    def pass_tokens(self) -> int:
        """Most tokens of a forward pass: those of one in training, which fitted into memory."""
        return self.config.training.per_device_train_batch_size * self.config.data.max_length

    def base_and_tuned(self, work: Callable[[], T]) -> tuple[T, T]:
        """Call `work` with the adapter switched off, then switched on; return both results."""
        with self.model.disable_adapter():
            base = work()
        return base, work()

    def measure_both(self, work: Callable[[T], pd.DataFrame], chunks: Iterable[T]) -> Tables:
        """Call `work` on each chunk with the base, then with the tuned model.

        Returns all rows of the base in one table, all rows of the tuned model in another.
        """
        tables = [self.base_and_tuned(partial(work, chunk)) for chunk in chunks]
        if not tables:
            return pd.DataFrame(), pd.DataFrame()
        base, tuned = (pd.concat(side, ignore_index=True) for side in zip(*tables, strict=True))
        return base, tuned

    def documents(self, source: str, *splits: str, limit: int | None = None) -> list[int]:
        """Draw documents of a source and some splits; return their numbers in the mixture.

        At most `limit` are drawn, by default `evaluation.max_documents`.
        """
        limit = limit or self.config.evaluation.max_documents
        return self.mixture.draw(self.seed, source, *splits)[:limit]

    def human_texts(self, source: str, *splits: str) -> list[str]:
        """Draw whole documents until they have 300,000 characters in all; return their texts."""
        outline = self.mixture.outline
        drawn = outline.loc[self.documents(source, *splits, limit=len(outline)), "characters"]
        chosen = drawn[drawn.cumsum().shift(fill_value=0) < HUMAN_CHARACTERS]
        return self.mixture.texts(chosen.index.tolist())

    def continue_rows(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continue rows of tokens; return for each row the text that was generated behind it.

        `settings` are those of `model.generate`. A batch has so many rows that its cache of keys
        and values holds at most `LOGITS` numbers, the bound on the logits of a batch.
        """
        layers = self.model.named_modules()
        widths = [layer.out_features for name, layer in layers if name.endswith(CACHED)]
        tokens = max(map(len, rows), default=0) + settings["max_new_tokens"]  # of the longest row
        size = max(1, LOGITS // (tokens * max(1, sum(widths))))
        generate = partial(continue_prompts, self.model, self.tokenizer, settings=settings)
        return [text for n in range(0, len(rows), size) for text in generate(rows[n : n + size])]

    def within_budget(
        self, message: str, items: Sequence[T], size: int, share: float
    ) -> Iterator[Sequence[T]]:
        """Yield batches of `size` items until `share` of `evaluation.minutes` has passed.

        The first batch is always yielded. `message` is the key of the progress bar's text in the
        messages' section `[bars]`, and begins the warning when items are left over.
        """
        minutes = self.config.evaluation.minutes or float("inf")
        deadline = time.monotonic() + 60 * share * minutes
        with tqdm(desc=messages("bars")[message], total=len(items), leave=False) as bar:
            for start in range(0, len(items), size):
                if start and time.monotonic() > deadline:
                    count = f"{start} of {len(items)}"
                    logger.warning("%s: %s within evaluation.minutes %g", message, count, minutes)
                    return
                yield (batch := items[start : start + size])
                bar.update(len(batch))
