"""Judge an adapter against its base on text that neither was trained on.

Every figure is measured for the base and for the tuned model on the same documents; the interval
of a difference comes from resampling documents, never tokens.
"""

from wuxia_core.evaluate.copying import FLAGGED
from wuxia_core.evaluate.recovery import XRay, xray
from wuxia_core.evaluate.scorecard import by_name, closing_words, evaluate, sentences
from wuxia_core.evaluate.scoring import bits_per_char
