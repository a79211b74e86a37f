"""Few books, many passes: which objective learns most from little text before it recites it.

    python benchmarks/few_books.py [FOLDER]

Five objectives on the bundled tiny model: on a tenth of 七剑十三侠 for 1, 3, 10 and 30 passes, on
all of it for 1 and 3, on three novels for 1, each with a schedule of its own and 10 % general text.
Each row says what a run learned of 绿牡丹, which is held out, what it forgot of general text, and
what it repeats of its training text. Two runs at a time, a core each, over four hours with one
seed. A run that is done has a row in results/few_books.csv and is not done again; FOLDER (default
output/few_books) holds texts and runs.
"""

import argparse
import shutil
from pathlib import Path

import objectives as shared
import pandas as pd
from objectives import CLM, HELD_OUT_NOVEL, NOVELS

from wuxia_core import mix
from wuxia_core.config import PROJECT
from wuxia_core.errors import exit_status, run_command
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import score_extraction
from wuxia_core.evaluate.scoring import score_bits
from wuxia_core.evaluate.statistics import Row
from wuxia_core.evaluate.writing import score_generations, write_passages
from wuxia_core.model import load_adapter, write_adapter

MEAP = "training.objective=meap"
CONDITIONS = {
    "masked": (),
    "clm": (CLM,),
    "meap": (MEAP,),
    "random tokens": (MEAP, "masking.corruption=[0, 1, 0]"),
    "clm, regularized": (CLM, "model.lora_dropout=0.1", "training.weight_decay=0.1"),
}
TENTH = "tenth of a novel"
BOOKS = {TENTH: NOVELS[1:2], "novel": NOVELS[1:2], "three novels": NOVELS}
TENTH_CHARACTERS = 50_000
HELD_OUT_SHARE = {TENTH: 0.79, "novel": 0.27, "three novels": 0.12}  # 绿牡丹 and no other book
DOSES = [
    (TENTH, 3),
    (TENTH, 10),
    (TENTH, 1),
    ("novel", 1),
    (TENTH, 30),
    ("novel", 3),
    ("three novels", 1),
]
FIGURES = {  # of the scorecard
    "武侠": ("bits_per_char", "wuxia"),
    "general": ("bits_per_char", "general"),
    "memorisation": ("memorisation", "wuxia"),
    "near extraction": ("extraction_near", "training"),
    "longest copied run": ("copied_length", "training"),
    "style strength": ("style_strength", "wuxia"),
}
RUN = ["condition", "text", "passes", "seed"]
COLUMNS = [*RUN, *FIGURES, *(f"{title}, {end}" for title in FIGURES for end in ("low", "high"))]
RESULTS = Path(__file__).parent / "results" / "few_books.csv"


def work(folder: Path, name: str, text: str, passes: int, seed: int) -> None:
    """Train one condition in this process, measure it, and add its row to the results."""
    sets = (
        f"data.data_dir={folder / text}", f"data.val_ratio={HELD_OUT_SHARE[text]}",
        f"data.processed_data_file={folder / 'mixtures' / text}",
        f"training.num_train_epochs={passes}", f"training.seed={seed}", "training.max_steps=-1",
        "evaluation.max_documents=48",
    )  # fmt: skip
    config = shared.settings(folder, *sets, *CONDITIONS[name])
    mixture = mix(config)
    novels = mixture.outline[mixture.outline["source"] == "wuxia"]
    assert set(novels["book"][novels["split"] == "validation"]) == {HELD_OUT_NOVEL}
    place = folder / "runs" / f"{name}, {text}, {passes} passes, seed {seed}"
    trainer = shared.new_trainer(config, mixture, place, [])
    trainer.train()
    write_adapter(trainer.model, place)
    context = EvalContext(*load_adapter(place), mixture, config)
    rows = [*score_bits(context), score_extraction(context)]
    rows += score_generations(context, write_passages(context))["metrics"]
    row = dict(zip(RUN, (name, text, passes, seed), strict=True)) | figures(rows)
    pd.DataFrame([row], columns=COLUMNS).to_csv(RESULTS, mode="a", header=False, index=False)


def figures(metrics: list[Row]) -> dict[str, float]:
    """Take the changes and their intervals from rows of the scorecard."""
    rows = {(row["name"], row["source"]): row for row in metrics}
    changes = {title: rows[key]["delta"] for title, key in FIGURES.items()}
    for title, key in FIGURES.items():
        changes |= {f"{title}, {end}": rows[key][end] for end in ("low", "high")}
    return changes


def gather_books(folder: Path) -> None:
    """Copy the books of each dose, and the held-out one, to where a run reads them."""
    for text, names in BOOKS.items():
        (folder / text).mkdir(exist_ok=True)
        for name in (*names, HELD_OUT_NOVEL):
            novel = shared.CORPUS / "wuxia" / f"{name}.txt"
            shutil.copyfile(novel, folder / text / novel.name)
    tenth = folder / TENTH / f"{NOVELS[1]}.txt"
    tenth.write_text(tenth.read_text("utf-8")[:TENTH_CHARACTERS], "utf-8")


def main() -> None:
    """Do what is not done yet, and write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=PROJECT / "output" / "few_books", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each condition")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.worker:
        name, text, *numbers = options.worker
        work(folder, name, text, *map(int, numbers))
        return
    shared.gather_texts(folder)
    gather_books(folder)
    if not RESULTS.exists():
        pd.DataFrame(columns=COLUMNS).to_csv(RESULTS, index=False)
    done = set(pd.read_csv(RESULTS)[RUN].itertuples(index=False))
    seeds = range(options.seeds)
    jobs = [(name, *dose, seed) for seed in seeds for dose in DOSES for name in CONDITIONS]
    shared.run_all(__file__, folder, [job for job in jobs if job not in done])
    rows = pd.read_csv(RESULTS).sort_values([*RUN[1:], RUN[0]])
    print(rows[[*RUN, *FIGURES]].to_string(index=False, float_format="{:+.3f}".format))


if __name__ == "__main__":
    run_command(lambda: exit_status(main))
