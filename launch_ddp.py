"""From novels to an adapter: mix, check, train under torchrun, evaluate, report.

python launch_ddp.py                                         the sample, on two CPU cores
python launch_ddp.py --novels FOLDER --general FOLDER        your own texts, into output/NAME
python launch_ddp.py --config configs/qwen3_8b_2x4090.yaml   the real recipe, one process a GPU
python launch_ddp.py --config my.yaml --set training.seed=7 --nproc 1
python launch_ddp.py --config my.yaml --plan                 its memory, hours and cost
python launch_ddp.py --config my.yaml --resume               go on with a run that was stopped
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from wuxia_core import mixing
from wuxia_core.config import PROJECT, Config, load_config
from wuxia_core.errors import ConfigError, MachineError, Stopped, exit_status, run_command
from wuxia_core.messages import messages

SAMPLE = PROJECT / "configs" / "sample.yaml"
STEPS = 400  # that the tiny base trains on the user's novels: minutes, however many these are


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read `arguments` (None: the command line); exit with status 2 if flags do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file (default: configs/sample.yaml)")
    parser.add_argument("--novels", metavar="FOLDER", help="your novels (data.data_dir)")
    parser.add_argument("--general", metavar="FOLDER", help="general text (data.general_file)")
    parser.add_argument("--name", help="run into output/NAME (default: as the folder of novels)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--nproc", type=int, help="processes here (default: one a GPU, 2 without)")
    parser.add_argument("--nnodes", type=int, default=1, help="machines that train together")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where they meet")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--allow-changed", action="store_true", help="with --resume: all the same")
    parser.add_argument("--max-restarts", type=int, default=0, help="after crashes, by itself")
    parser.add_argument("--plan", action="store_true", help="say what the run needs; start nothing")
    parser.add_argument("--measure", action="store_true", help="with --plan: time 20 steps")
    parser.add_argument("--doctor", action="store_true", help="check the machine, in all processes")
    options = parser.parse_args(arguments)
    for flag, other in (("measure", "plan"), ("allow_changed", "resume")):
        if getattr(options, flag) and not getattr(options, other):
            parser.error(f"--{flag.replace('_', '-')}: goes with --{other}")
    if (options.nnodes > 1) != (options.rdzv_endpoint is not None) or options.nnodes < 1:
        parser.error("--nnodes, 2 or more, and --rdzv-endpoint go together")
    if [options.doctor, options.plan, options.resume].count(True) > 1:
        parser.error("--doctor, --plan and --resume: one at a time")
    if (options.doctor or options.plan) and options.nnodes > 1:
        parser.error("--nnodes: --doctor looks at one machine, --plan at all of plan.cards")
    if options.max_restarts < 0:
        parser.error("--max-restarts: must be at least 0")
    if options.nproc is not None and options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: must be at least 1")
    return options


def settings(options: argparse.Namespace) -> list[str]:
    """Turn --novels, --general and --name into `section.key=value`; --set comes last, and so wins.

    `--novels "my texts"` gives `data.data_dir=my texts`, `training.output_dir=output/my-texts` ….
    """
    if "" in (options.novels, options.general, options.name):  # from an unset shell variable
        raise ConfigError(
            "--novels, --general, --name: one of them is empty; name it or leave it out"
        )
    values: dict[str, object] = {}
    if options.novels:
        values["data.data_dir"] = options.novels
    if options.novels and options.config is None:  # without the general text of sample.yaml
        values["data.general_file"] = "null"
        if not any(pair.startswith("training.num_train_epochs=") for pair in options.set):
            values["training.max_steps"] = STEPS
    if options.general:
        values["data.general_file"] = options.general
    if name := options.name or (options.novels and Path(options.novels).resolve().name):
        safe_name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "novels"
        values["data.processed_data_file"] = f"data/mixed/{safe_name}"
        values["training.output_dir"] = f"output/{safe_name}"
    return [*(f"{key}={value}" for key, value in values.items()), *options.set]


def plan(options: argparse.Namespace, config: Config) -> None:
    """Print a forecast of what the run needs; with --measure also mix its texts and time steps.

    The steps are timed in processes that `torchrun.launch` starts for a temporary run folder, and
    the first of them prints the result. Raises `ConfigError`, `DataError` or `MachineError` if the
    run could not start; with --measure `torchrun.Failure` if timing fails, `Stopped` at a signal.
    """
    from wuxia_core import preflight, torchrun

    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            processes = torchrun.Processes(preflight.process_count(options.nproc))
            preflight.prepare_run(config, Path(folder), processes)
            torchrun.launch(Path(folder), processes, "--measure")
    else:
        print(preflight.forecast(config, options.nproc))


def doctor(options: argparse.Namespace, config: Config) -> None:
    """Check the machine in as many processes as a run has; raise `MachineError` if a check fails.

    The first process prints a row for each check (`preflight.doctor`). All read the config from a
    temporary folder.
    """
    from wuxia_core import preflight, torchrun

    processes = torchrun.Processes(preflight.process_count(options.nproc))
    with tempfile.TemporaryDirectory() as folder:
        config.save(Path(folder) / "config.yaml")
        try:
            torchrun.launch(Path(folder), processes, module="wuxia_core.preflight.doctor")
        except torchrun.Failure:
            raise MachineError("a check failed; what to do stands beside it") from None


def train(options: argparse.Namespace, config: Config) -> None:
    """Choose and prepare the run folder, train there, and `finish`.

    Raises `Stopped` after a signal, and `torchrun.Failure` if a process failed. The message names
    the command that goes on with the run, unless the process gave a reason that would make it fail
    again, such as too little GPU memory. Before the training begins, raises `ConfigError`,
    `DataError` or `MachineError` if settings, texts or machine are unfit.
    """
    from wuxia_core import preflight, run, torchrun

    folder_is_named = bool(options.config or options.name or options.rdzv_endpoint) or any(
        pair.startswith("training.output_dir=") for pair in options.set
    )
    count = preflight.process_count(options.nproc)  # processes on this machine
    processes = torchrun.Processes(count, options.nnodes, options.rdzv_endpoint)
    selection = {"named": folder_is_named, "resume": options.resume}
    with run.acquire(config, **selection, rendezvous=options.rdzv_endpoint) as folder:
        start = run.resume_point(folder) if options.resume else None
        if options.resume:
            run.check_unchanged(config, folder, start, processes.total, options.allow_changed)
        preflight.prepare_run(config, folder, processes, start)
        flags = ["--allow-changed"] if options.allow_changed else []
        with mixing.in_use(folder, config.data.processed_data_file):
            try:
                torchrun.supervise(folder, processes, start, flags, options.max_restarts)
                finish(folder)
            except torchrun.Failure as failure:
                raise torchrun.with_next_step(failure, folder, count) from None
            except (Stopped, KeyboardInterrupt) as error:
                reason = str(error) or "by a signal"
                raise Stopped(f"{reason}; {torchrun.describe_saved(folder, count)}") from None


def finish(folder: Path) -> None:
    """Evaluate, write the page and print the result, if this launcher started the first process."""
    from wuxia_core import evaluate, page, run

    if not run.is_main_launcher(folder):
        print("trained; the machine that started the first process evaluates")
        return
    print("evaluating base and tuned on held-out text")
    scorecard = evaluate.evaluate(folder, echo=print)
    print(f"\n{evaluate.closing_words(scorecard, page.write_page(folder, scorecard))}")


def main(arguments: list[str] | None = None) -> int:
    """Do what `arguments` (None: the command line) ask for, and return the exit status."""
    options = parse(arguments)
    return exit_status(lambda: launch(options))


def launch(options: argparse.Namespace) -> None:
    """Load the config, the sample's by default; call `doctor`, or find texts and `plan` or `train`.

    Raises `ConfigError` or `DataError` if config or texts are unfit, and what these three raise.
    """
    print(messages("training")["looking"], file=sys.stderr)  # "looking at settings, texts …"
    config = load_config(SAMPLE if options.config is None else options.config, settings(options))
    if options.doctor:
        doctor(options, config)
        return
    mixing.find_texts(config)  # refuses missing and too short texts before torch loads
    command = plan if options.plan else train
    command(options, config)


if __name__ == "__main__":
    run_command(main)
