"""From novels to an adapter: mix, check, train under torchrun, evaluate, report.

python launch_ddp.py                                         the sample, on two CPU cores
python launch_ddp.py --config configs/qwen3_8b_2x4090.yaml   the real recipe, one process a GPU
python launch_ddp.py --config my.yaml --set data.data_dir=novels --nproc 1
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from wuxia_core.config import PROJECT, load_config
from wuxia_core.errors import MachineError, WuxiaError

SAMPLE = PROJECT / "configs" / "sample.yaml"
STOPPED, BUG = 75, 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file (default: configs/sample.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--nproc", type=int, help="processes (default: one a GPU, 2 without)")
    later = parser.add_argument_group("not yet")
    for flag in ("--plan", "--measure", "--doctor", "--resume", "--allow-changed"):
        later.add_argument(flag, action="store_true")
    later.add_argument("--nnodes")
    later.add_argument("--rdzv-endpoint")
    later.add_argument("--max-restarts", type=int)
    options = parser.parse_args(arguments)
    for name in ("plan", "measure", "doctor", "resume", "allow_changed", "nnodes",
                 "rdzv_endpoint", "max_restarts"):  # fmt: skip
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')}: not yet in this version; leave it out")
    return options


def prepare(options: argparse.Namespace) -> tuple[Path, int]:
    """Check everything that can be checked without a model, mix, and write the run's config."""
    from wuxia_core import preflight
    from wuxia_core.mixing import mix, train_windows

    config = load_config(options.config or SAMPLE, options.set)
    named = bool(options.config) or any(s.startswith("training.output_dir=") for s in options.set)
    folder = preflight.claim_output_dir(config, named)
    config.training.output_dir = str(folder)
    processes = preflight.process_count(options.nproc)
    preflight.check_precision(config)
    mixture = mix(config)
    windows = len(train_windows(mixture))
    preflight.check_windows(config, windows, processes)
    print(preflight.summary(config, processes, mixture, windows))
    for precaution in preflight.card_precautions():
        print(precaution)
    preflight.open_run_folder(config, folder)
    print(f"training into {folder}")
    return folder, processes


def torchrun(folder: Path, processes: int) -> None:
    """Train in this many processes; torchrun's agent runs here, so signals reach it."""
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    run(
        parse_args(
            ["--standalone", f"--nproc-per-node={processes}", "-m", "wuxia_core.train", str(folder)]
        )
    )


def saved(folder: Path) -> str:
    """Say what a stopped run leaves behind."""
    steps = sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    return f"saved: {folder}/checkpoint-{steps[-1]}" if steps else f"no checkpoint in {folder} yet"


def failure(error: Any, folder: Path) -> int:
    """Say what stopped torchrun and choose the exit status."""
    failures = sorted(error.failures.values(), key=lambda f: (f.exitcode <= 1, f.timestamp))
    first = failures[0]
    if first.exitcode > BUG:
        print(f"error: {first.message['message'].partition(': ')[2]}", file=sys.stderr)
        return int(first.exitcode)
    if first.exitcode < 0:
        said = f"{first.message}, perhaps for want of memory; {saved(folder)}"
        print(f"error: {said}", file=sys.stderr)
        return STOPPED if "checkpoint-" in said else MachineError.exit_status
    print("error: this is a bug; the traceback of the failed process is above", file=sys.stderr)
    return BUG


def finish(folder: Path) -> None:
    """Evaluate, write the report and say what came out."""
    from wuxia_core import evaluate, report

    print("evaluating base and tuned on held-out text")
    card = evaluate.evaluate(folder)
    page = report.run("05_evaluate_adapter", {"output_dir": str(folder)}, folder / "reports")
    print(report.closing_table(card))
    print(f"\nadapter    {folder}\nscorecard  {folder / 'scorecard.json'}\nreport     {page}")


def launch(options: argparse.Namespace) -> int:
    """Do all of it; return the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    folder, processes = prepare(options)
    try:
        torchrun(folder, processes)
    except ChildFailedError as error:
        return failure(error, folder)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}; {saved(folder)}", file=sys.stderr)
        return STOPPED
    finish(folder)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Launch; a user's mistake gets one message, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    options = parse(arguments)
    try:
        return launch(options)
    except WuxiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
