"""Few books, many passes: which objective learns most from one novel, or three, before it recites.

    python benchmarks/few_books.py [FOLDER]

Five objectives on the bundled tiny model, on 七剑十三侠 for 1, 3, 10 and 30 passes and on three
novels for 1 and 3, each with a schedule of its own and 10 % general text. The scorecard of each
says what it learned of 绿牡丹, which is held out, what it forgot of general text, and what it
repeats of its training text. Two runs at a time, a core each, about three hours with one seed.
A run that is done has a row in results/few_books.csv and is not done again; FOLDER (default
output/few_books) holds texts and runs.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import objectives as shared
import pandas as pd
from objectives import CLM, HELD_OUT_NOVEL, NOVELS

from wuxia_core import mix
from wuxia_core.config import PROJECT
from wuxia_core.errors import exit_status, run_command
from wuxia_core.evaluate import evaluate
from wuxia_core.model import write_adapter

MEAP = "training.objective=meap"
CONDITIONS = {
    "masked": (),
    "meap": (MEAP,),
    "random tokens": (MEAP, "masking.corruption=[0, 1, 0]"),
    "clm": (CLM,),
    "clm, regularized": (CLM, "model.lora_dropout=0.1", "training.weight_decay=0.1"),
}
BOOKS = {1: ("七剑十三侠",), 3: NOVELS}
HELD_OUT_SHARE = {1: 0.27, 3: 0.12}  # of all characters, by books: 绿牡丹 and no other
DOSES = [(1, 1), (1, 3), (3, 1), (1, 10), (3, 3), (1, 30)]  # books and passes, the shortest first
FIGURES = {  # of the scorecard
    "武侠": ("bits_per_char", "wuxia"),
    "general": ("bits_per_char", "general"),
    "memorisation": ("memorisation", "wuxia"),
    "near extraction": ("extraction_near", "training"),
    "longest copied run": ("copied_length", "training"),
    "style strength": ("style_strength", "wuxia"),
}
RUN = ["condition", "books", "passes", "seed"]
COLUMNS = [*RUN, *FIGURES, *(f"{title}, {end}" for title in FIGURES for end in ("low", "high"))]
RESULTS = Path(__file__).parent / "results" / "few_books.csv"


def run_place(folder: Path, name: str, books: int, passes: int, seed: int) -> Path:
    """Name the folder of a run."""
    return folder / "runs" / f"{name}, {books} books, {passes} passes, seed {seed}"


def work(folder: Path, name: str, books: int, passes: int, seed: int) -> None:
    """Train one condition in this process, and write its scorecard."""
    place = run_place(folder, name, books, passes, seed)
    sets = (
        f"data.data_dir={folder / str(books)}", f"data.val_ratio={HELD_OUT_SHARE[books]}",
        f"data.processed_data_file={folder / 'mixtures' / str(books)}",
        f"training.num_train_epochs={passes}", f"training.seed={seed}", "training.max_steps=-1",
        "evaluation.max_documents=48",
    )  # fmt: skip
    config = shared.settings(folder, *sets, *CONDITIONS[name])
    mixture = mix(config)
    novels = mixture.outline[mixture.outline["source"] == "wuxia"]
    assert set(novels["book"][novels["split"] == "validation"]) == {HELD_OUT_NOVEL}
    trainer = shared.new_trainer(config, mixture, place, [])
    trainer.train()
    write_adapter(trainer.model, place)
    row = dict(zip(RUN, (name, books, passes, seed), strict=True)) | figures(evaluate(place))
    pd.DataFrame([row], columns=COLUMNS).to_csv(RESULTS, mode="a", header=False, index=False)


def figures(card: dict[str, Any]) -> dict[str, float]:
    """Take the changes and their intervals from a scorecard."""
    rows = {(row["name"], row["source"]): row for row in card["metrics"]}
    changes = {title: rows[key]["delta"] for title, key in FIGURES.items()}
    for title, key in FIGURES.items():
        changes |= {f"{title}, {end}": rows[key][end] for end in ("low", "high")}
    return changes


def main() -> None:
    """Do what is not done yet, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=PROJECT / "output" / "few_books", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each condition")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.worker:
        name, *numbers = options.worker
        work(folder, name, *map(int, numbers))
        return
    shared.gather_texts(folder)
    for books, names in BOOKS.items():
        (folder / str(books)).mkdir(exist_ok=True)
        for name in (*names, HELD_OUT_NOVEL):
            novel = shared.CORPUS / "wuxia" / f"{name}.txt"
            shutil.copyfile(novel, folder / str(books) / novel.name)
    if not RESULTS.exists():
        pd.DataFrame(columns=COLUMNS).to_csv(RESULTS, index=False)
    done = set(pd.read_csv(RESULTS)[RUN].itertuples(index=False))
    jobs = [(name, *dose, seed) for seed in range(options.seeds) for dose in DOSES
            for name in CONDITIONS]  # fmt: skip
    shared.run_all(__file__, folder, [job for job in jobs if job not in done])
    rows = pd.read_csv(RESULTS).sort_values([*RUN[1:], RUN[0]])
    print(rows[[*RUN, *FIGURES]].to_string(index=False, float_format="{:+.3f}".format))


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
