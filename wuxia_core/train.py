"""The training stage: what torchrun starts in each process, for a run folder that is prepared.

    python launch_ddp.py                                        # all stages, from novels on
    torchrun --nproc-per-node 2 -m wuxia_core.train RUN_FOLDER  # only this stage

The loop is `wuxia_core.trainer`. Here the config is translated for it, base and mixture are loaded,
and a failure becomes an exit status.
"""

import atexit
import hashlib
import json
import os
import platform
import re
import signal
import socket
import sys
import time
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from wuxia_core import model, run
from wuxia_core import trainer as loop
from wuxia_core.config import Config, effective_batch, load_config
from wuxia_core.errors import (
    BUG,
    ConfigError,
    DeviceLost,
    MachineError,
    RankLost,
    Stopped,
    WuxiaError,
    heeded_signals,
    lacks_memory,
    make_output_expendable,
    presentable,
)
from wuxia_core.messages import messages
from wuxia_core.mixing import VALIDATION, Mixture, held_out_windows, open_run_mixture, train_windows
from wuxia_core.preflight import held_out_limits, save_steps
from wuxia_core.text import one_line
from wuxia_core.write import Sampling, continue_prompts, encode_prompt, seeded, training_precision

# Keys of the section training that `TrainingArguments` lacks, or that are given to it otherwise.
OWN_KEYS = {
    "output_dir", "objective", "early_stopping_patience", "save_steps", "warmup_steps", "compile"
}  # fmt: skip

TIMED_STEPS, WARM_UP_STEPS = 20, 2  # steps that are timed; the first of these, not counted
OPENING_COUNT, OPENING_LENGTH = 3, 20  # openings continued at each measurement; their characters
PASSAGE_TOKENS = 40  # tokens that are written after each opening
# The failures of this process's own GPU or link; ncclRemoteError means that another one is gone.
NCCL_FAILED = re.compile("nccl(UnhandledCuda|System|Internal)Error")


def parse() -> Namespace:
    """Read the command line: `folder`, `measure`, `start` (checkpoint or None), `allow_changed`."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", action="store_true", help="time the first steps, save nothing")
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint to go on from")
    parser.add_argument(
        "--allow-changed", action="store_true", help="go on from --from on another base"
    )
    return parser.parse_args()


def arguments(config: Config, options: Namespace) -> TrainingArguments:
    """Translate the config for `Trainer`; `options` are those that `parse` reads.

    The folder for TensorBoard is set in the environment. Raises `MachineError` if the machine has a
    GPU that torch cannot use.
    """
    folder, on_gpu = options.folder, model.best_device() == "cuda"
    warmup = config.training.warmup_steps  # never None in a run that the launcher prepared
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    return TrainingArguments(
        output_dir=str(folder),
        **config.training.model_dump(exclude=OWN_KEYS),
        warmup_steps=0.05 if warmup is None else warmup,  # 0.05: 5 % of the steps
        eval_strategy="no" if options.measure else "steps",
        eval_on_start=not (options.measure or options.start),
        save_strategy="no" if options.measure else "steps",
        lr_scheduler_type="cosine",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_nan_inf_filter=False,  # a NaN stays in the loss, and `StopOnNonFinite` finds it
        remove_unused_columns=False,  # a `Window` has no columns
        disable_tqdm=True,  # Progress draws the bar
        use_cpu=not on_gpu,
        ddp_backend="nccl" if on_gpu else "gloo",
        ddp_find_unused_parameters=False,
    )


def train(options: Namespace) -> loop.SpanTrainer:
    """Train the adapter that `config.yaml` in `options.folder` describes, and save it there.

    All processes of the run call this together. With `options.measure` only the first steps are
    done, and neither a checkpoint nor an adapter is saved. Returns the trainer.

    Raises `Stopped` if a signal stopped the run, `NonFiniteError` if loss or gradient became NaN or
    infinite, other `WuxiaError`s if config, base or mixture are unfit, and errors that
    `as_user_error` translates: of a full disk, memory, a lost process.
    """
    folder, start = options.folder, options.start
    run.hold_lock(folder)
    config = load_config(folder / "config.yaml")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available():
        # accelerate passes the time-out on for GPUs only
        dist.init_process_group("gloo", timeout=timedelta(seconds=config.training.ddp_timeout))
    # transformers 5.24 deprecates the argument's name; 5.23 does not know the new one.
    warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
    if int(os.environ.get("RANK", 0)):
        disable_progress_bar()  # transformers' bars are drawn by the first process
    args, stop_on_signal = arguments(config, options), loop.StopOnSignal()
    set_seed(config.training.seed)
    callbacks = [stop_on_signal, loop.Progress(), loop.StopOnNonFinite()]
    callbacks.append(FirstSteps(stop=options.measure))
    trainer = make_trainer(config, args, options, callbacks)
    if trainer.is_world_process_zero():
        write_environment(config, folder, args.world_size)
        run.clear_staging(folder)
    step = run.step_of(start) if start else 0  # that the run goes on from
    trainer.write_row({"event": "resumed" if step else "started", "step": step})
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    if stop_on_signal.stopped_at:
        raise Stopped(f"by a signal at step {stop_on_signal.stopped_at}")
    if not options.measure and trainer.is_world_process_zero():
        loop.finish(trainer.accelerator.unwrap_model(trainer.model), folder)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return trainer


def make_trainer(
    config: Config, args: TrainingArguments, options: Namespace, callbacks: list[TrainerCallback]
) -> loop.SpanTrainer:
    """Load base and mixture and make the run's trainer; complete `args` and `callbacks` in place.

    Raises `ConfigError` if a checkpoint is of another base and `options.allow_changed` is not set.
    """
    folder, start, name = options.folder, options.start, model.base_path(config.model)
    tokenizer = model.load_tokenizer(name)
    base = model.load_base(name, model.weights_dtype(config), config.model.quantization)
    facts = dependencies(folder, base)  # for each checkpoint's manifest
    if start and not options.allow_changed and run.manifest(start)["base"] != facts["base"]:
        remedy = "put them back, or insist with --allow-changed"
        raise ConfigError(f"{start} was trained on other weights than {name} has; {remedy}")
    model.check_length(config, base.config)
    mask_id = model.mask_token_id(tokenizer, base.config.vocab_size, config.masking.mask_token)
    mixture = open_run_mixture(folder, config.data.processed_data_file)
    windows, max_documents = train_windows(mixture), config.evaluation.max_documents
    args.save_steps = save_steps(config, len(windows), args.world_size)
    _, max_windows = held_out_limits(config, len(windows), args.world_size)  # of each source
    held_out = held_out_windows(mixture, max_documents, config.training.seed, max_windows)
    if not held_out:
        args.eval_strategy, args.eval_on_start = "no", False
    if "wuxia" in held_out:
        callbacks.append(loop.KeepBest(folder, config.training.early_stopping_patience))
        callbacks.append(Passages(folder, tokenizer, openings(mixture, config.training.seed)))
    adapted = model.add_adapter(base, config.model, mask_id)
    # Else each process, when it resumes, reads the adapter by way of the first GPU.
    device = "cpu" if args.use_cpu else str(args.device)
    adapted.load_adapter = partial(adapted.load_adapter, torch_device=device)
    if config.training.compile:
        model.compile_layers(adapted)
    collator = model.make_collator(config, tokenizer, mask_id, config.training.objective)
    data = {"data_collator": collator, "train_dataset": windows, "eval_dataset": held_out or None}
    trainer = loop.SpanTrainer(
        adapted, args, compute_loss_func=loop.masked_cross_entropy, callbacks=callbacks, **data
    )
    trainer.facts = facts
    trainer.remove_callback(PrinterCallback)  # which prints every logged row
    return trainer


class FirstSteps(TrainerCallback):
    """Time the first 20 steps; print the hours of the run at that rate, and the peak of memory.

    The first two steps are not counted, since the device warms up in them; if the run has no more
    than these, its last step is counted. A run of fewer than 20 steps is timed to its end. With
    `stop` training ends after the last timed step.
    """

    def __init__(self, *, stop: bool) -> None:
        self._stop, self._step_start = stop, 0.0
        self._seconds: list[float] = []  # that each step took

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; between steps held-out text is measured and checkpoints are saved."""
        self._step_start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; after the last timed step print the mean and what follows from it."""
        self._seconds.append(time.monotonic() - self._step_start)
        if len(self._seconds) != min(TIMED_STEPS, state.max_steps):
            return
        control.should_training_stop |= self._stop
        if state.is_world_process_zero:
            counted = self._seconds[WARM_UP_STEPS:] or self._seconds[-1:]
            seconds = mean(counted)  # of one step
            rate = state.num_input_tokens_seen / state.global_step / seconds  # tokens/s
            tqdm.write(
                f"measured over {len(counted)} steps: {seconds:.2f} s a step, {rate:,.0f} "
                f"tokens/s, peak {loop.peak_memory() / 2**30:.2f} GiB a process; at that rate "
                f"{state.max_steps * seconds / 3600:.2f} hours for all {state.max_steps} steps"
            )


class Passages(TrainerCallback):
    """Continue the same openings with the same random numbers at every measurement.

    So a reader can compare the style. Only the first rank does this: it prints the beginning of
    each passage, and adds a row to `metrics.jsonl` with the whole `passages`, each with `prompt`
    and `text`. The passages of step 0 are written by the untrained adapter, that is by the base.
    """

    def __init__(self, folder: Path, tokenizer: Any, prompts: list[str]) -> None:
        self._folder, self._tokenizer, self._prompts = folder, tokenizer, prompts

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        """Write the passages in the training's precision; leave its random numbers alone."""
        if not state.is_world_process_zero:
            return
        prompt_ids = [encode_prompt(self._tokenizer, text, chat=False) for text in self._prompts]
        settings = Sampling(PASSAGE_TOKENS).settings() | {"min_new_tokens": PASSAGE_TOKENS}
        precision, draws = training_precision(model), seeded(model, args.seed)
        # eager: else each length of the text would compile the layers anew
        with precision, draws, torch.compiler.set_stance("force_eager"):
            texts = continue_prompts(model, self._tokenizer, prompt_ids, settings)
        pairs = list(zip(self._prompts, texts, strict=True))
        passages = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        row = {"step": state.global_step, "time": time.time(), "passages": passages}
        run.append(self._folder, row)
        template = messages("training")["measured"]
        lines = [template.format(step=state.global_step, bits=metrics[loop.BEST_METRIC])]
        # The prompt's end and the text's beginning, on a line of 80 columns; 汉字 take two each.
        lines += [f"  {one_line(prompt)[-12:]} → {one_line(text)[:24]}" for prompt, text in pairs]
        tqdm.write("\n".join(lines))


def openings(mixture: Mixture, seed: int) -> list[str]:
    """Give the first `OPENING_LENGTH` characters of held-out 武侠 chapters that `seed` draws.

    An opening begins below the chapter's title, its first line. `OPENING_COUNT` openings are given,
    or fewer if fewer chapters are held out.
    """
    texts = mixture.texts(mixture.draw(seed, "wuxia", VALIDATION)[:OPENING_COUNT])
    return [(text.partition("\n")[2] or text).lstrip()[:OPENING_LENGTH] for text in texts]


def main() -> None:
    """Train as the command line says, and end the process; at an error `exit_with` ends it."""
    for number in heeded_signals():
        signal.signal(number, signal.SIG_DFL)  # end at once; the launcher names the signal
    make_output_expendable()
    options = parse()
    sys.excepthook = lambda _, error, __: exit_with(error, options.folder)
    if "RANK" not in os.environ:
        raise ConfigError("wuxia_core.train runs under torchrun: python launch_ddp.py, or torchrun")
    if not options.start and (options.folder / model.ADAPTER_WEIGHTS).exists():
        raise ConfigError(f"{options.folder}: the run there is finished; name another folder")
    # The trainer is held until `os._exit`: freeing a DDP model can wait for ever for gloo's thread,
    # which itself waits for the GIL.
    trainer = train(options)  # noqa: F841
    atexit._run_exitfuncs()  # which `os._exit` does not call
    sys.stdout.flush()
    os._exit(0)


def exit_with(error: BaseException, folder: Path) -> None:
    """Tell the launcher what went wrong, and end this process with the error's exit status.

    Without a launcher the message is printed; so is the traceback of a bug. The process ends
    without cleaning up, which would wait for the other processes, whatever these are doing.
    """
    user_error = as_user_error(error, folder)
    if user_error:
        get_error_handler().record_exception(user_error)  # into the file that the launcher reads
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:  # without a launcher
            print(f"error: {presentable(str(user_error))}", file=sys.stderr)
    else:
        traceback.print_exception(error, file=sys.__stderr__)  # torch may buffer `sys.stderr`
    sys.stdout.flush()
    os._exit(user_error.exit_status if user_error else BUG)


def as_user_error(error: BaseException, folder: Path) -> WuxiaError | None:
    """Translate an exception into an error with a message for the user; give None for a bug.

    `folder` is the run folder, which the message names if reading or writing failed.
    """
    if isinstance(error, WuxiaError):
        return error
    lines = str(error).splitlines() or [""]
    first, last = lines[0], lines[-1]
    if isinstance(error, (MemoryError, RuntimeError)) and lacks_memory(error):
        return MachineError(f"out of memory ({first}); {model.LESS_MEMORY}")
    if isinstance(error, dist.DistError) and "/dev/shm" in str(error):
        return MachineError(f"/dev/shm is too small ({last}); docker run --shm-size=1g")
    if NCCL_FAILED.search(str(error)):
        return DeviceLost(f"the cards cannot talk to each other ({last}); --doctor looks at them")
    if isinstance(error, torch.AcceleratorError):
        return DeviceLost(f"a card failed ({first}); dmesg may name an Xid")
    if isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter" in first:
        return MachineError(f"{folder}: reading or writing failed ({first}); is the disk full?")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in first):
        return RankLost(f"another process is gone or does not answer ({first})")
    return None


def dependencies(folder: Path, base: torch.nn.Module) -> dict[str, Any]:
    """Hash what the adapter depends on: `config`, `data` and `base`; add the package `versions`.

    `config` is the run's config.yaml, `data` its mixture's manifest. Of the base, the name, the
    shape and the first 1,024 values of each weight are hashed: enough to tell models apart.
    """
    digest = hashlib.sha256()
    for name, weight in base.named_parameters():
        values = weight.detach().flatten()[:1024].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.tobytes())
    files = {"config": folder / "config.yaml", "data": folder / "mixture.json"}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return {**hashes, "base": digest.hexdigest(), "versions": run.versions()}


def write_environment(config: Config, folder: Path, world_size: int) -> None:
    """Write to `environment.json` which machine, versions and number of processes a run has.

    Only the first rank calls this. `launcher` is the host name and process id of its parent: by
    them a launcher finds out, in `run.is_main_launcher`, whether it started the first rank.
    """
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "processes": world_size,
        "effective_batch": effective_batch(config, world_size),
        "launcher": [socket.gethostname(), os.getppid()],
        **run.versions(),
    }
    (folder / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
