"""Compare the objectives: which one learns 武侠 style, and at what cost in general text.

    python benchmarks/objectives.py [FOLDER]

Eight conditions × three seeds of 300 steps of 8 × 256 tokens on the bundled tiny model, four of
them without general text too. Trained on 三侠五义, 七剑十三侠 and 续小五义 with 10 % general text;
judged every 30 steps on openings of 绿牡丹's chapters and of encyclopaedia articles, none of them
trained on. At a half and a quarter of the rate, each with its own schedule, what learns more ends
where the recipe does: there forgetting is compared. Two runs at a time, a core each. What is done
lies in FOLDER (default output/objectives) and is not done again; the tables come from there. The
texts are `wuxia/` and `general/` of the folder `WUXIA_CORPUS`, else of `../shared/corpus`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plot_objectives import equal_learning, since_start
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from wuxia_core import mix, run, xray
from wuxia_core.config import PROJECT, Config, load_config
from wuxia_core.errors import exit_status, run_command
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.scoring import document_bits
from wuxia_core.evaluate.statistics import Metric, compare
from wuxia_core.evaluate.statistics import ratio as ratio_of
from wuxia_core.evaluate.writing import score_generations, write_passages
from wuxia_core.masking import SpanMasker
from wuxia_core.mixing import Mixture
from wuxia_core.mixing.store import VALIDATION
from wuxia_core.model import load_adapter, load_tokenizer, write_adapter
from wuxia_core.train import arguments, make_trainer
from wuxia_core.trainer import SpanTrainer, masked_cross_entropy

CORPUS = Path(os.environ.get("WUXIA_CORPUS", PROJECT.parent / "shared" / "corpus"))
NOVELS = ("三侠五义", "七剑十三侠", "续小五义")
HELD_OUT_NOVEL, HELD_OUT_GENERAL = "绿牡丹", "zhwiki_cmrc2018_trial"
STEPS, EVERY, WINDOW, BATCH = 300, 30, 256, 8
PASSAGES, CHARACTERS = 48, 240  # of each source; an opening fits a window
SEEDS = (0, 1, 2)
RATE = 5e-4  # of the sample's recipe
CLM, MIXED = "training.objective=clm", "training.objective=mixed"
HALF, QUARTER = (f"training.learning_rate={RATE / n}" for n in (2, 4))
CONDITIONS: dict[str, tuple[str, ...]] = {
    "masked": (),
    "meap": ("training.objective=meap",),
    "mixed": (MIXED,),
    "mixed, 1/2 rate": (MIXED, HALF),
    "mixed, 1/4 rate": (MIXED, QUARTER),
    "clm": (CLM,),
    "clm, 1/2 rate": (CLM, HALF),
    "clm, 1/4 rate": (CLM, QUARTER),
}
WITHOUT_GENERAL = ["masked", "clm", "clm, 1/2 rate", "clm, 1/4 rate"]
WRITING = ["masked", "meap", "mixed", "clm"]
HELD_OUT_SHARE = 0.16  # of the four novels, which holds the shortest, 绿牡丹, and no other
RESULTS = Path(__file__).parent / "results" / "objectives.csv"
Job = tuple[str, float, int]  # condition, share of general text, seed
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
        "all": [*novels, CORPUS / "wuxia" / f"{HELD_OUT_NOVEL}.txt"],
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
    seen = xray(trainer.model.eval(), tokenizer, list(held_out["text"]), SpanMasker())
    tokens = seen.tokens[["text", "kind", "base_right", "tuned_right"]]
    tokens.to_parquet(place / "masks.parquet")
    curve.table().to_parquet(place / "curve.parquet")


def new_trainer(
    config: Config, mixture: Mixture, place: Path, callbacks: list[TrainerCallback]
) -> SpanTrainer:
    """Open a run's folder anew, and set up its training, which measures and saves nothing."""
    shutil.rmtree(place, ignore_errors=True)
    run.open_folder(config, mixture, place)
    options = argparse.Namespace(folder=place, measure=True, start=None, allow_changed=False)
    args = arguments(config, options)
    args.report_to, args.logging_steps = [], EVERY
    set_seed(config.training.seed)
    return make_trainer(config, args, options, callbacks)


def judge(folder: Path, name: str, ratio: float, seed: int) -> None:
    """Have a trained condition write, and measure what it wrote; 绿牡丹 is held out here too."""
    place = run_place(folder, name, ratio, seed)
    share = f"data.val_ratio={HELD_OUT_SHARE}"
    mixture = f"data.processed_data_file={folder / 'mixtures' / 'judged'}"
    config = settings(folder, share, mixture, f"data.data_dir={folder / 'all'}")
    context = EvalContext(*load_adapter(place), mix(config), config)
    held_out = context.mixture.outline.loc[context.documents("wuxia", VALIDATION), "book"]
    assert set(held_out) == {HELD_OUT_NOVEL}
    written = score_generations(context, write_passages(context))["metrics"]
    (place / "writing.json").write_text(json.dumps(written, ensure_ascii=False), "utf-8")


def run_place(folder: Path, name: str, ratio: float, seed: int) -> Path:
    """Name the folder of a run."""
    return folder / "runs" / f"{name.replace('/', '-')}, {ratio:.0%} general, seed {seed}"


def run_all(script: str, folder: Path, jobs: Iterable[tuple[object, ...]]) -> None:
    """Do jobs, two at a time, each in a process with a core of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", script, str(folder)]

    def one(job: tuple[object, ...]) -> None:
        said = subprocess.run(
            [*command, "--worker", *map(str, job)], capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if said.returncode:
            raise RuntimeError(f"{job} failed:\n{said.stderr[-3000:]}")

    left = list(jobs)
    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(one, left), total=len(left), desc=Path(script).stem))


def undone(folder: Path, work: str, result: str, jobs: list[Job]) -> list[tuple[object, ...]]:
    """List the jobs whose result is not there, as `run_all` takes them."""
    return [(work, *job) for job in jobs if not (run_place(folder, *job) / result).exists()]


def curves(folder: Path, jobs: Iterable[Job]) -> pd.DataFrame:
    """Read the curves of some runs, a row a passage, step and run."""
    parts = []
    for name, ratio, seed in jobs:
        curve = pd.read_parquet(run_place(folder, name, ratio, seed) / "curve.parquet")
        parts.append(curve.assign(condition=name, ratio=ratio, seed=seed))
    return pd.concat(parts, ignore_index=True)


def at(curve: pd.DataFrame, column: str, value: float) -> pd.DataFrame:
    """Read bits of each passage off one run's curve where a column has a value, between two steps.

    A run that ends before it is read at its end.
    """
    steps = curve.drop_duplicates("step")
    bits = curve.pivot(index="document", columns="step", values="bits")  # (documents, steps)
    place = np.interp(value, steps[column], np.arange(len(steps)))
    low = min(int(place), len(steps) - 2)
    mixed = bits.iloc[:, low] * (low + 1 - place) + bits.iloc[:, low + 1] * (place - low)
    first = curve[curve["step"] == 0].set_index("document")
    return first[["source", "chars"]].assign(base=first["bits"], tuned=mixed)


def change(runs: pd.DataFrame, column: str, value: float) -> dict[str, str]:
    """Compare with the base, all seeds of a condition together: the change by source."""
    read = pd.concat([at(curve, column, value) for _, curve in runs.groupby("seed")])
    cells = {}
    for source, rows in read.groupby("source"):
        sums = rows[["chars", "base", "tuned"]].groupby(level=0).sum()
        sides = [sums[["chars"]].assign(bits=sums[side]) for side in ("base", "tuned")]
        metric = Metric("bits", "bits/character", str(source), ratio_of("bits", "chars"))
        row = compare(metric, *sides, seed=0)
        cells[str(source)] = f"{row['delta']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    return cells


def recovered(folder: Path, jobs: list[Job], documents: pd.DataFrame) -> str:
    """Give the masked tokens of 武侠 that are found, base to tuned, all seeds together."""
    novels = documents.index[documents["source"] == "wuxia"]
    masks = pd.concat([pd.read_parquet(run_place(folder, *job) / "masks.parquet") for job in jobs])
    share = masks[masks["text"].isin(novels)][["base_right", "tuned_right"]].mean()
    return f"{share['base_right']:.1%} → {share['tuned_right']:.1%}"


def report(folder: Path, done: pd.DataFrame, held_out: pd.DataFrame) -> None:
    """Print the table of conditions at 10 % general text."""
    ten = done[done["ratio"] == 0.1]
    masked = ten[(ten["condition"] == "masked") & (ten["step"] == STEPS)]
    asked, seconds = masked["asked"].mean(), masked["seconds"].mean()
    rows = {}
    for name in CONDITIONS:
        runs = ten[ten["condition"] == name]
        last = runs[(runs["step"] == STEPS) & (runs["source"] == "wuxia")]
        by_seed = last.groupby("seed")[["bits", "chars"]].sum()
        tokens, supervised, time_ = (
            change(runs, column, value)
            for column, value in (("step", STEPS), ("asked", asked), ("seconds", seconds))
        )
        rows[name] = {
            "武侠": tokens["wuxia"], "general": tokens["general"],
            "sd of seeds": f"{(by_seed['bits'] / by_seed['chars']).std():.3f}",
            "武侠, equal supervised": supervised["wuxia"],
            "general, equal supervised": supervised["general"],
            "武侠, equal time": time_["wuxia"], "general, equal time": time_["general"],
            "masked found": recovered(folder, [(name, 0.1, seed) for seed in SEEDS], held_out),
            "CPU s a step": f"{last['seconds'].mean() / STEPS:.2f}",
        }  # fmt: skip
    print(f"\nchange of bits per character, {PASSAGES} passages of each source, {len(SEEDS)} seeds")
    print(pd.DataFrame(rows).T.to_string())


def report_equal(done: pd.DataFrame) -> None:
    """Print what general text costs where each has learned as much as `masked` at its end."""
    keys = ["condition", "ratio", "seed", "step", "asked", "seconds", "source"]
    sums = done.groupby(keys, as_index=False)[["bits", "chars"]].sum()
    rows = []
    for row in equal_learning(since_start(sums)).itertuples():
        runs = done[(done["condition"] == row.condition) & (done["ratio"] == row.ratio)]
        rows.append((f"{row.ratio:.0%}", row.condition, row.step))
        rows[-1] += tuple(change(runs, "step", row.step)[side] for side in ("wuxia", "general"))
    print("\nat equal learning, by share of general text; a step below the last is on the way")
    columns = ["general text", "condition", "step", "武侠", "general"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))


def report_writing(folder: Path, names: list[str]) -> None:
    """Print the table of what base and tuned wrote, one seed."""
    columns = {}
    for name in names:
        text = (run_place(folder, name, 0.1, 0) / "writing.json").read_text("utf-8")
        rows = [row for row in json.loads(text) if row["delta"] is not None]
        columns["base"] = {row["name"]: f"{row['base']:.3f}" for row in rows}
        columns[name] = {
            row["name"]: f"{row['tuned']:.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            for row in rows
        }
        columns["human"] = {row["name"]: f"{row['human']:.3f}" for row in rows if "human" in row}
    print("\nwhat they write; in brackets the interval of the change")
    print(pd.DataFrame(columns).to_string())


def main() -> None:
    """Do what is not done yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=PROJECT / "output" / "objectives", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.worker:
        work, name, ratio, seed = options.worker
        {"train": train, "judge": judge}[work](folder, name, float(ratio), int(seed))
        return
    began = time.monotonic()
    gather_texts(folder)
    held_out = passages(folder)
    conditions = [(0.1, CONDITIONS), (0.0, WITHOUT_GENERAL)]
    jobs = [(name, share, seed) for seed in SEEDS for share, names in conditions for name in names]
    run_all(__file__, folder, undone(folder, "train", "curve.parquet", jobs))
    done = curves(folder, jobs)
    report(folder, done, held_out)
    report_equal(done)
    writers = [(name, 0.1, 0) for name in WRITING]
    run_all(__file__, folder, undone(folder, "judge", "writing.json", writers))
    report_writing(folder, WRITING)
    print(f"\n{(time.monotonic() - began) / 60:.1f} minutes, less what was there already")
    keys = ["condition", "ratio", "seed", "step", "source"]
    sums = {"bits": "sum", "chars": "sum", "asked": "first", "seconds": "first"}
    done.groupby(keys, sort=False).agg(sums).round(2).to_csv(RESULTS)


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
