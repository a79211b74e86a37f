"""Judge an adapter against its base on text neither was trained on.

Every figure is measured for the base and for the tuned model on the same documents; the interval
of a difference comes from resampling documents, never tokens.
"""

from wuxia_core.evaluate.closing import closing_table
from wuxia_core.evaluate.scorecard import evaluate, scorecard
from wuxia_core.evaluate.scoring import bits_per_char
from wuxia_core.evaluate.xray import XRay, xray
