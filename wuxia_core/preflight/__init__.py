"""What is checked and said before a run: the machine, the run folder, memory, time and cost."""

from wuxia_core.preflight.plan import held_out_limits, save_steps
from wuxia_core.preflight.prepare import forecast, prepare_run, process_count
