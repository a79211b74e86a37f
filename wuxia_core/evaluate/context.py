"""What an evaluation works with: the model with its adapter, the mixture, settings and time."""

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
Tables = tuple[pd.DataFrame, pd.DataFrame]  # base, tuned
logger = logging.getLogger(__name__)


class EvalContext(NamedTuple):
    """An adapter on its base, and the mixture it was trained on."""

    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    mixture: Mixture
    config: Config

    @property
    def seed(self) -> int:
        """Seed of the run; everything random depends only on it."""
        return self.config.training.seed

    @property
    def pass_tokens(self) -> int:
        """Tokens of a forward pass: those of one in training, which also had a backward pass."""
        return self.config.training.per_device_train_batch_size * self.config.data.max_length

    def base_and_tuned(self, work: Callable[[], T]) -> tuple[T, T]:
        """Do something with the base, then with the tuned model."""
        with self.model.disable_adapter():
            base = work()
        return base, work()

    def measure_both(self, work: Callable[[T], pd.DataFrame], chunks: Iterable[T]) -> Tables:
        """Let base and tuned work on each chunk, and put together what each of them gives."""
        tables = [self.base_and_tuned(partial(work, chunk)) for chunk in chunks]
        if not tables:
            return pd.DataFrame(), pd.DataFrame()
        base, tuned = (pd.concat(side, ignore_index=True) for side in zip(*tables, strict=True))
        return base, tuned

    def documents(self, source: str, *splits: str, limit: int | None = None) -> list[int]:
        """Draw documents of some splits by key, `evaluation.max_documents` or another limit."""
        most = limit or self.config.evaluation.max_documents
        return self.mixture.draw(self.seed, source, *splits)[:most]

    def human_texts(self, source: str, *splits: str) -> list[str]:
        """Draw whole documents of about 300,000 characters in all."""
        outline = self.mixture.outline
        drawn = outline.loc[self.documents(source, *splits, limit=len(outline)), "characters"]
        chosen = drawn[drawn.cumsum().shift(fill_value=0) < 300_000]
        return self.mixture.texts(chosen.index.tolist())

    def continue_rows(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continue rows of tokens, as many at once as keep keys and values as small as logits.

        Of held-out text in training, that is.
        """
        layers = self.model.named_modules()
        kept = [layer for name, layer in layers if name.endswith(("k_proj", "v_proj"))]
        tokens = max(map(len, rows), default=0) + settings["max_new_tokens"]
        fits = max(1, LOGITS // (tokens * max(1, sum(layer.out_features for layer in kept))))
        go_on = partial(continue_prompts, self.model, self.tokenizer, settings=settings)
        return [text for n in range(0, len(rows), fits) for text in go_on(rows[n : n + fits])]

    def within_budget(
        self, what: str, items: Sequence[T], size: int, share: float
    ) -> Iterator[Sequence[T]]:
        """Give `size` items at a time, once and while a share of `evaluation.minutes` lasts.

        `what` names their bar, and the warning where that was too short.
        """
        minutes = self.config.evaluation.minutes or float("inf")
        end = time.monotonic() + 60 * share * minutes
        with tqdm(desc=messages("bars")[what], total=len(items), leave=False) as bar:
            for start in range(0, len(items), size):
                if start and time.monotonic() > end:
                    done = f"{start} of {len(items)}"
                    logger.warning("%s: %s within evaluation.minutes %g", what, done, minutes)
                    return
                yield (some := items[start : start + size])
                bar.update(len(some))
