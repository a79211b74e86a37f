"""From novels to an adapter: mix, check, train under torchrun, evaluate, report.

python launch_ddp.py                                         the sample, on two CPU cores
python launch_ddp.py --config configs/qwen3_8b_2x4090.yaml   the real recipe, one process a GPU
python launch_ddp.py --config my.yaml --set data.data_dir=novels --nproc 1
python launch_ddp.py --config my.yaml --plan                 its memory, hours and cost
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

from wuxia_core.config import PROJECT, load_config
from wuxia_core.errors import STOPPED, MachineError, WuxiaError

SAMPLE = PROJECT / "configs" / "sample.yaml"
LATER = ("--resume", "--allow-changed", "--nnodes", "--rdzv-endpoint", "--max-restarts")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file (default: configs/sample.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--nproc", type=int, help="processes (default: one a GPU, 2 without)")
    parser.add_argument("--plan", action="store_true", help="say what the run needs; start nothing")
    parser.add_argument("--measure", action="store_true", help="with --plan: time 20 steps")
    parser.add_argument("--doctor", action="store_true", help="check the machine, in all processes")
    for flag in LATER:
        parser.add_argument(flag, nargs="?", const="", help="not yet")
    options = parser.parse_args(arguments)
    for flag in LATER:
        if getattr(options, flag[2:].replace("-", "_")) is not None:
            parser.error(f"{flag}: not yet in this version; leave it out")
    if options.measure and not options.plan:
        parser.error("--measure: goes with --plan")
    return options


def prepare(options: argparse.Namespace, folder: Path | None = None) -> tuple[Path, int]:
    """Check, mix and forecast; return the run folder and how many processes to start."""
    from wuxia_core import preflight

    config = load_config(options.config or SAMPLE, options.set)
    named = bool(options.config) or any(s.startswith("training.output_dir=") for s in options.set)
    folder = folder or preflight.claim_output_dir(config, named)
    return folder, preflight.prepare(config, folder, options.nproc)


def plan(options: argparse.Namespace) -> int:
    """Say what the run needs; with --measure, time its first steps too."""
    from wuxia_core import preflight

    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            torchrun(*prepare(options, Path(folder)), "--measure")
    else:
        print(preflight.forecast(load_config(options.config or SAMPLE, options.set), options.nproc))
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Check the machine; 5 where something is wrong."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from wuxia_core import preflight

    config = load_config(options.config or SAMPLE, options.set)
    with tempfile.TemporaryDirectory() as folder:
        config.save(Path(folder) / "config.yaml")
        try:
            processes = preflight.process_count(options.nproc)
            torchrun(Path(folder), processes, module="wuxia_core.preflight.doctor")
        except ChildFailedError:
            print("error: a check failed; what to do stands beside it", file=sys.stderr)
            return MachineError.exit_status
    return 0


def torchrun(folder: Path, processes: int, *flags: str, module: str = "wuxia_core.train") -> None:
    """Start a module in this many processes; torchrun's agent runs here, so signals reach it."""
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    where = ["--standalone", f"--nproc-per-node={processes}"]
    run(parse_args([*where, "-m", module, str(folder), *flags]))


def finish(folder: Path) -> None:
    """Evaluate, write the report and say what came out."""
    from wuxia_core import evaluate, report

    print("evaluating base and tuned on held-out text")
    card = evaluate.evaluate(folder)
    page = report.run("05_evaluate_adapter", {"output_dir": str(folder)}, folder / "reports")
    print(evaluate.closing_table(card))
    print(f"\nadapter    {folder}\nscorecard  {folder / 'scorecard.json'}\nreport     {page}")


def launch(options: argparse.Namespace) -> int:
    """Do all of it; return the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from wuxia_core import preflight

    if options.doctor or options.plan:
        return doctor(options) if options.doctor else plan(options)
    folder, processes = prepare(options)
    try:
        torchrun(folder, processes)
        finish(folder)
    except ChildFailedError as error:
        return preflight.failure(error, folder)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}; {preflight.saved(folder)}", file=sys.stderr)
        return STOPPED
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Launch; a user's mistake gets one message, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until torchrun takes it over
    try:
        return launch(options)
    except WuxiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped before training; nothing is lost", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
