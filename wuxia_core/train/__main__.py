"""What torchrun starts, one process a device: train the adapter on a mixture that is already there.

    python launch_ddp.py                                        # does all of it, from novels on
    torchrun --nproc-per-node 2 -m wuxia_core.train RUN_FOLDER  # only this stage

The loop is transformers' `Trainer`; the files beside this add what it cannot know: an epoch that
travels with each window, the loss over asked tokens only, and a stop at a bad gradient.
"""

import json
import os
import platform
import signal
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import PrinterCallback, TrainingArguments, set_seed

from wuxia_core.config import Config, load_config
from wuxia_core.errors import MachineError, WuxiaError
from wuxia_core.masking import MaskCollator
from wuxia_core.mixing import held_out_windows, open_run_mixture, train_windows
from wuxia_core.model import add_adapter, load_base, load_tokenizer, mask_token_id, weights_dtype
from wuxia_core.objective import asked_cross_entropy
from wuxia_core.preflight import advice, effective_batch, read_shape, this_device
from wuxia_core.train.callbacks import FirstSteps, MetricsFile, Progress, StopOnNonFinite
from wuxia_core.train.trainer import SpanTrainer

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")


def arguments(config: Config, folder: Path) -> TrainingArguments:
    """Translate the config for `Trainer`."""
    ours = config.training.model_dump(exclude={"output_dir", "objective"})
    return TrainingArguments(
        output_dir=str(folder),
        **ours,
        eval_strategy="steps",
        eval_on_start=True,
        lr_scheduler_type="cosine",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        average_tokens_across_devices=True,
        include_num_input_tokens_seen="all",
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=["tensorboard"],
        disable_tqdm=True,  # Progress draws the bar
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
        ddp_find_unused_parameters=False,
    )


def train(folder: Path, *, measure: bool = False) -> None:
    """Train the adapter of a run folder, whose `config.yaml` says everything, and save it there.

    With `measure` the first steps are timed and nothing is saved.
    """
    config = load_config(folder / "config.yaml")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "logs")
    args = arguments(config, folder)
    check_world_size(args.world_size)
    set_seed(config.training.seed)
    name = config.model.model_name_or_path
    tokenizer = load_tokenizer(name)
    base = load_base(name, weights_dtype(config), config.model.quantization)
    mask_id = mask_token_id(tokenizer, base.config.vocab_size, config.masking.mask_token)
    mixture = open_run_mixture(folder, config.data.processed_data_file)
    held_out = held_out_windows(mixture, config.evaluation.max_documents, config.training.seed)
    if not held_out or measure:
        args.eval_strategy, args.eval_on_start = "no", False
    if measure:
        args.save_strategy = "no"
    trainer = SpanTrainer(
        model=add_adapter(base, config.model, mask_id),
        args=args,
        data_collator=MaskCollator.from_config(
            config, tokenizer, mask_id, config.training.objective
        ),
        train_dataset=train_windows(mixture),
        eval_dataset=held_out or None,
        compute_loss_func=asked_cross_entropy,
        callbacks=[MetricsFile(folder), StopOnNonFinite(), Progress(), FirstSteps(stop=measure)],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        write_environment(config, folder, args.world_size)
    trainer.train()
    if not measure and trainer.is_world_process_zero():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder)


def check_world_size(found: int) -> None:
    """Raise `MachineError` where the processes that torchrun started did not all meet."""
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if found != wanted:
        raise MachineError(
            f"{found} of {wanted} processes have met; python launch_ddp.py --doctor says more"
        )


def save_adapter(model: Any, folder: Path) -> None:
    """Put the two files of the adapter into the run folder, without PEFT's empty model card."""
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        model.save_pretrained(staging)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (Path(staging) / name).replace(folder / name)


def write_environment(config: Config, folder: Path, world_size: int) -> None:
    """Write what the run ran on to `environment.json`."""
    on_gpu = torch.cuda.is_available()
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpu_count": os.cpu_count(),
        "processes": world_size,
        "effective_batch": effective_batch(config, world_size),
        **{package: version(package) for package in PACKAGES},
    }
    (folder / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main() -> None:
    """Train; a failure that is not a bug ends with its message and exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher says what stopped the run
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        train(Path(sys.argv[1]), measure="--measure" in sys.argv)
    except torch.cuda.OutOfMemoryError as error:
        _fail(out_of_memory(Path(sys.argv[1]), str(error)))
    except WuxiaError as error:
        _fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def out_of_memory(folder: Path, message: str) -> MachineError:
    """Say what saves memory, as the plan before the run does."""
    config = load_config(folder / "config.yaml")
    shape = read_shape(config.model.model_name_or_path)
    changes = advice(config, shape, this_device(int(os.environ.get("WORLD_SIZE", 1))))
    head = f"out of GPU memory ({message.splitlines()[0]}). What to change:"
    return MachineError("\n".join([head, *changes]))


def _fail(error: WuxiaError) -> None:
    """Hand the message to the launcher and leave with the error's status."""
    get_error_handler().record_exception(error)
    sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
