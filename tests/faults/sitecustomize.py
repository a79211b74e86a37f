"""Breaks a process of a run from within, where that cannot be timed from outside.

Python imports this at its start where the folder is on PYTHONPATH; WUXIA_FAULT says what to break.
"""

import os
import signal
import sys

sys.modules["bitsandbytes"] = None  # two seconds a process, and no base here is quantized

fault, rank = os.environ.get("WUXIA_FAULT"), os.environ.get("RANK")

if fault == "killed while saving" and rank == "0":
    from wuxia_core import run

    write = run.write_manifest

    def write_manifest(checkpoint, facts):
        if checkpoint.name == "checkpoint-8":
            os.kill(os.getpid(), signal.SIGKILL)
        write(checkpoint, facts)

    run.write_manifest = write_manifest

if fault and fault.startswith("signal while measuring") and rank == "1":
    from wuxia_core.trainer import StopOnSignal

    look = StopOnSignal.on_prediction_step

    def on_prediction_step(self, args, state, control, **named):
        if state.global_step == int(fault.split()[-1]):
            os.kill(os.getpid(), signal.SIGTERM)
        look(self, args, state, control, **named)

    StopOnSignal.on_prediction_step = on_prediction_step

if fault == "not a number" and rank == "1":
    from wuxia_core import trainer

    loss, calls = trainer.masked_cross_entropy, []

    def masked_cross_entropy(*arguments, **named):
        calls.append(None)
        return loss(*arguments, **named) * (float("nan") if len(calls) == 6 else 1)

    trainer.masked_cross_entropy = masked_cross_entropy
