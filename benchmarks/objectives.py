"""Compare the objectives: which one learns 武侠 style, and at what cost in general text.

    python benchmarks/objectives.py [FOLDER]

Nine conditions × three seeds of 300 steps of 4 × 256 tokens on the bundled tiny model, five of
them without general text too. Trained on 三侠五义, 七剑十三侠 and 续小五义 with 10 % general text;
judged every 30 steps on openings of 绿牡丹's chapters and of encyclopaedia articles, none of them
trained on. At lower rates, each with its own schedule, what learns more ends where the recipe does:
there forgetting is compared. Two runs at a time, a core each; the texts are `wuxia/` and `general/`
of the folder `WUXIA_CORPUS`, else of `../shared/corpus`. A run that is done stands in
results/objectives.parquet and is not done again; FOLDER (default output/objectives) holds texts and
runs. At the end it prints what `plot_objectives.py` prints.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plot_objectives
from plot_objectives import RESULTS, RUN
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from wuxia_core import mix, run, xray
from wuxia_core.config import PROJECT, Config, load_config
from wuxia_core.errors import exit_status, run_command
from wuxia_core.evaluate.scoring import document_bits
from wuxia_core.masking import SpanMasker
from wuxia_core.mixing import Mixture
from wuxia_core.model import load_tokenizer, write_adapter
from wuxia_core.train import arguments, make_trainer
from wuxia_core.trainer import SpanTrainer, masked_cross_entropy

CORPUS = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))
NOVELS = ("三侠五义", "七剑十三侠", "续小五义")
HELD_OUT_NOVEL, HELD_OUT_GENERAL = "绿牡丹", "zhwiki_cmrc2018_trial"
STEPS, EVERY, WINDOW, BATCH = 300, 30, 256, 4
PASSAGES, CHARACTERS = 48, 240  # of each source; an opening fits a window
SEEDS = (0, 1, 2)
RATE = 5e-4  # of the sample's recipe
CLM, MIXED = "training.objective=clm", "training.objective=mixed"
HALF, QUARTER, EIGHTH = (f"training.learning_rate={RATE / n}" for n in (2, 4, 8))
CONDITIONS: dict[str, tuple[str, ...]] = {
    "masked": (),
    "meap": ("training.objective=meap",),
    "clm": (CLM,),
    "clm, 1/2 rate": (CLM, HALF),
    "clm, 1/4 rate": (CLM, QUARTER),
    "clm, 1/8 rate": (CLM, EIGHTH),
    "mixed": (MIXED,),
    "mixed, 1/2 rate": (MIXED, HALF),
    "mixed, 1/4 rate": (MIXED, QUARTER),
}
WITHOUT_GENERAL = ["masked", "clm", "clm, 1/2 rate", "clm, 1/4 rate", "clm, 1/8 rate"]
Job = tuple[object, ...]  # of a run: condition, share of general text, seed
COMMON = (
    f"training.max_steps={STEPS}", f"training.per_device_train_batch_size={BATCH}",
    f"data.max_length={WINDOW}", "evaluation.max_documents=1",
)  # fmt: skip


def gather_texts(folder: Path) -> None:
    """Copy novels and general text to where a run reads them, held-out ones apart."""
    if not CORPUS.is_dir():
        sys.exit(f"error: no texts at {CORPUS}; set WUXIA_CORPUS")
    general = [p for p in (CORPUS / "general").glob("*.txt") if p.stem != HELD_OUT_GENERAL]
    novels = [CORPUS / "wuxia" / f"{name}.txt" for name in NOVELS]
    places = {
        "train": novels, "general": general,
        "held_out": [CORPUS / "wuxia" / f"{HELD_OUT_NOVEL}.txt"],
        "held_out_general": [CORPUS / "general" / f"{HELD_OUT_GENERAL}.txt"],
    }  # fmt: skip
    for name, paths in places.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copyfile(path, folder / name / path.name)


def settings(folder: Path, *sets: str, held_out: bool = False) -> Config:
    """Make a condition's configuration out of the sample's; nothing of its novels is held out."""
    novels, general = ("held_out", "held_out_general") if held_out else ("train", "general")
    data = [
        f"data.data_dir={folder / novels}", f"data.general_file={folder / general}",
        "data.val_ratio=0", f"data.processed_data_file={folder / 'mixtures' / novels}",
    ]  # fmt: skip
    return load_config(PROJECT / "configs" / "sample.yaml", [*data, *COMMON, *sets])


def passages(folder: Path) -> pd.DataFrame:
    """Take openings of held-out documents, evenly spread: `source` and `text`."""
    documents = mix(settings(folder, "data.general_ratio=0.2", held_out=True)).documents
    long = documents[documents["characters"] >= CHARACTERS]
    rows = [
        group.iloc[np.linspace(0, len(group) - 1, PASSAGES).round().astype(int)]
        for _, group in long.groupby("source", sort=False)
    ]
    chosen = pd.concat(rows, ignore_index=True)
    return chosen[["source"]].assign(text=chosen["text"].str[:CHARACTERS])


class Curve(TrainerCallback):
    """Scores the passages every few steps; counts asked tokens, and the CPU time of steps alone."""

    def __init__(self, held_out: pd.DataFrame, tokenizer: Any) -> None:
        self._held_out, self._tokenizer = held_out, tokenizer
        self._seconds, self._asked = 0.0, 0
        self._rows: list[pd.DataFrame] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Score the base."""
        self._score(model, 0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Stop it, and score."""
        self._seconds += time.process_time() - self._began
        if state.global_step % EVERY == 0:
            self._score(model, state.global_step)

    def loss(self, outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        """Count what is asked."""
        self._asked += int(num_items_in_batch)
        return masked_cross_entropy(outputs, labels, num_items_in_batch)

    def table(self) -> pd.DataFrame:
        """Give all scores, a row a passage and step."""
        return pd.concat(self._rows).rename_axis("document").reset_index()

    def _score(self, model: Any, step: int) -> None:
        model.eval()
        texts = self._held_out["text"]
        bits = document_bits(model, self._tokenizer, texts, WINDOW)
        model.train()
        of = {"step": step, "seconds": self._seconds, "asked": self._asked}
        self._rows.append(bits.assign(source=self._held_out["source"], **of))


def train(folder: Path, name: str, ratio: float, seed: int) -> None:
    """Train one condition in this process, and write its curve, its masks and its adapter."""
    held_out, place = passages(folder), run_place(folder, name, ratio, seed)
    config = settings(
        folder, *CONDITIONS[name], f"data.general_ratio={ratio}", f"training.seed={seed}",
        f"data.processed_data_file={folder / 'mixtures' / f'ratio_{ratio:g}'}",
    )  # fmt: skip
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    curve = Curve(held_out, tokenizer)
    trainer = new_trainer(config, mix(config), place, [curve])
    trainer.compute_loss_func = curve.loss
    trainer.train()
    write_adapter(trainer.model, place)
    tokens = xray(trainer.model.eval(), tokenizer, list(held_out["text"]), SpanMasker()).tokens
    found = tokens.groupby("text")[["base_right", "tuned_right"]].mean()
    rows = curve.table().merge(found, left_on="document", right_index=True)
    run_of = dict(zip(RUN, (name, ratio, seed), strict=True))
    rows.assign(**run_of).to_parquet(place / "curve.parquet", index=False)


def new_trainer(
    config: Config, mixture: Mixture, place: Path, callbacks: list[TrainerCallback]
) -> SpanTrainer:
    """Open a run's folder anew, and set up its training, which measures and saves nothing."""
    shutil.rmtree(place, ignore_errors=True)
    run.write_setup(config, mixture, place)
    options = argparse.Namespace(folder=place, measure=True, start=None, allow_changed=False)
    args = arguments(config, options)
    args.report_to, args.logging_steps = [], EVERY
    set_seed(config.training.seed)
    return make_trainer(config, args, options, callbacks)


def run_place(folder: Path, name: str, ratio: float, seed: int) -> Path:
    """Name the folder of a run."""
    return folder / "runs" / f"{name.replace('/', '-')}, {ratio:.0%} general, seed {seed}"


def run_all(
    script: str, folder: Path, jobs: Iterable[Job], keep: Callable[[Job], object] = lambda _: None
) -> None:
    """Do jobs, two at a time, each in a process with a core of its own; `keep` what each made."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", script, str(folder)]

    def one(job: Job) -> Job:
        said = subprocess.run(
            [*command, "--worker", *map(str, job)], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if said.returncode:
            raise RuntimeError(f"{job} failed:\n{said.stderr[-3000:]}")
        return job

    left = list(jobs)
    with ThreadPoolExecutor(2) as pool:
        for job in tqdm(pool.map(one, left), total=len(left), desc=Path(script).stem):
            keep(job)


def keep(folder: Path, job: Job) -> None:
    """Add a run's curve to the results."""
    kept = [pd.read_parquet(RESULTS)] if RESULTS.exists() else []
    rows = pd.concat([*kept, pd.read_parquet(run_place(folder, *job) / "curve.parquet")])
    rows.to_parquet(RESULTS, index=False)


def main() -> None:
    """Do what is not done yet, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=PROJECT / "output" / "objectives", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.worker:
        name, ratio, seed = options.worker
        train(folder, name, float(ratio), int(seed))
        return
    gather_texts(folder)
    passages(folder)  # once, before two workers want them
    conditions = [(0.0, WITHOUT_GENERAL), (0.1, CONDITIONS)]
    jobs = [(name, share, seed) for share, names in conditions for seed in SEEDS for name in names]
    done = set(pd.read_parquet(RESULTS)[RUN].itertuples(index=False)) if RESULTS.exists() else set()
    run_all(__file__, folder, [job for job in jobs if job not in done], partial(keep, folder))
    plot_objectives.print_tables()


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
