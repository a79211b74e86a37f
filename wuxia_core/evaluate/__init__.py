"""Judge an adapter against its base: what it learned and forgot, and whether it copied.

Every metric is measured for the base and for the tuned model on the same items: documents of
held-out or training text, passages written after the same prompts, or questions. The interval of a
difference comes from resampling whole items, never single tokens; that of the questions, and that
of recited prefixes if there are none, comes from a formula.
"""

from wuxia_core.evaluate.copying import FLAGGED
from wuxia_core.evaluate.recovery import XRay, xray
from wuxia_core.evaluate.scorecard import by_name, closing_words, evaluate, sentences, tiny_warning
from wuxia_core.evaluate.scoring import bits_per_char
