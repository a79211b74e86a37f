"""What is checked and said before a run: the machine, the run folder, memory, time and cost."""

from wuxia_core.preflight.checks import check_settings, effective_batch, process_count
from wuxia_core.preflight.plan import advice, plan, planned_device, this_device
from wuxia_core.preflight.prepare import forecast, prepare
from wuxia_core.preflight.shape import Shape, read_shape
