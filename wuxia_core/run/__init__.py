"""A run: its folder, who is at work in it, its checkpoints, its processes, and how it ended."""

from wuxia_core.run.checkpoints import clear_staging, step_of
from wuxia_core.run.folder import claimed, led_here, open_folder
from wuxia_core.run.lock import join
from wuxia_core.run.outcome import Ended, closing, saved
from wuxia_core.run.resume import check_unchanged, manifest, resume_point, versions
from wuxia_core.run.torchrun import Processes, supervise, torchrun
