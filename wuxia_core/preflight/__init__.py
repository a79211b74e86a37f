"""What is checked and said before a run: the machine, the run folder, memory, time and cost."""

from wuxia_core.preflight.checks import (
    claim_output_dir,
    effective_batch,
    open_run_folder,
    process_count,
)
from wuxia_core.preflight.outcome import failure, newest_checkpoint, saved
from wuxia_core.preflight.plan import advice, plan, planned_device, this_device
from wuxia_core.preflight.prepare import forecast, prepare
from wuxia_core.preflight.shape import Shape, read_shape
