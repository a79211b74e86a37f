"""The scorecard of a run folder: every metric for base and tuned, and a passage by each."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from wuxia_core import mixing, model
from wuxia_core.config import Config, load_config
from wuxia_core.corpus import clean
from wuxia_core.corpus.cleaning import NOVELS_ONLY
from wuxia_core.evaluate.scoring import document_bits, masked_recovery
from wuxia_core.evaluate.statistics import METRICS, compare
from wuxia_core.masking import MaskCollator
from wuxia_core.model import document_start_id

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "剑光一闪"
PASSAGE_TOKENS = 80


def evaluate(output_dir: str | Path) -> dict[str, Any]:
    """Score a run folder and write `scorecard.json` into it.

    Raises `DataError` where the folder holds no finished adapter, or its mixture is gone.
    """
    import torch

    folder = Path(output_dir)
    adapter = model.adapter_settings(folder)
    config = load_config(folder / "config.yaml")
    mixture = mixing.open_run_mixture(folder, config.data.processed_data_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tuned, tokenizer = model.load_adapter(folder, device)
    collate = MaskCollator.from_config(
        config, tokenizer, adapter["trainable_token_indices"][0], "masked"
    )
    limit, seed = config.evaluation.max_documents, config.training.seed
    held_out = mixing.held_out_windows(mixture, limit, seed)
    rows = []
    for source in ("wuxia", "general"):
        windows = held_out.get(source)
        with tuned.disable_adapter():
            base_scores = _documents(tuned, tokenizer, collate, mixture, windows, config)
        scores = _documents(tuned, tokenizer, collate, mixture, windows, config)
        for metric in METRICS:
            row = compare(base_scores, scores, metric, seed)
            rows.append({"source": source, **row})
    passages = _passages(tuned, tokenizer, seed)
    card = {
        "base": adapter["base_model_name_or_path"],
        "adapter": str(folder),
        "metrics": rows,
        "passages": passages,
    }
    text = json.dumps(card, ensure_ascii=False, indent=1)
    (folder / "scorecard.json").write_text(text, encoding="utf-8")
    return card


def scorecard(output_dir: str | Path) -> dict[str, Any]:
    """Read a run folder's `scorecard.json`; measure it first where there is none.

    Raises `DataError` where the folder holds no finished adapter.
    """
    path = Path(output_dir) / "scorecard.json"
    if path.is_file():
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return card
    return evaluate(output_dir)


def _documents(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    collate: MaskCollator,
    mixture: mixing.Mixture,
    windows: mixing.Windows | None,
    config: Config,
) -> pd.DataFrame:
    """Score a source's held-out documents in every way: a row a document that has windows."""
    if windows is None:
        return pd.DataFrame(columns=["bits", "chars", "nats", "right", "asked"])
    batch_size = config.training.per_device_eval_batch_size
    recovered = masked_recovery(model, collate, windows, batch_size)
    texts = mixture.texts(recovered.index)
    bits = document_bits(model, tokenizer, texts, config.data.max_length, batch_size)
    return recovered.assign(bits=bits["bits"].to_numpy(), chars=bits["chars"].to_numpy())


def _passages(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", seed: int
) -> dict[str, str]:
    """Let base and tuned continue the same prompt from the same seed."""
    with model.disable_adapter():
        base = continuation(model, tokenizer, PROMPT, seed)
    return {"prompt": PROMPT, "base": base, "tuned": continuation(model, tokenizer, PROMPT, seed)}


def continuation(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, seed: int
) -> str:
    """Sample 80 tokens after a prompt (temperature 0.9, nucleus 0.95), without blank lines."""
    import torch

    ids = [document_start_id(tokenizer), *tokenizer(prompt, add_special_tokens=False).input_ids]
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            torch.tensor([ids], device=model.device),
            do_sample=True,
            temperature=0.9,
            top_p=0.95,
            max_new_tokens=PASSAGE_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
    return clean(tokenizer.decode(output[0], skip_special_tokens=True), NOVELS_ONLY)[0]
