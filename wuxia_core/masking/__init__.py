"""What is hidden from the model: spans and single tokens, keyed so that every draw can be repeated.

A row's mask hangs on (seed, epoch, key of the window) alone, never on its neighbours in the batch,
the rank or the worker. This stage draws and applies masks; it knows nothing of text or models.
"""

from wuxia_core.masking.arrange import KEPT, SINGLE, SPAN, Floats, Kinds
from wuxia_core.masking.collator import IGNORE_INDEX, MaskCollator, model_inputs, padded
from wuxia_core.masking.corruption import HIDDEN, LEFT, REPLACED, Corruption, check_shares
from wuxia_core.masking.spans import SpanMasker, coverage
