import copy
import json
import math
import shutil
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from wuxia_core import bits_per_char, mix, run
from wuxia_core.config import ModelConfig, load_config
from wuxia_core.errors import DataError
from wuxia_core.evaluate import closing_words, context, evaluate, scoring
from wuxia_core.evaluate.__main__ import main
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import score_extraction
from wuxia_core.evaluate.recovery import score_recovery
from wuxia_core.evaluate.scorecard import (
    PARTS,
    _read_or_make,
    affordable_minutes,
    best_strength,
    frontier,
    gate_failures,
    openings,
)
from wuxia_core.evaluate.scoring import document_bits, score_bits, score_questions
from wuxia_core.evaluate.statistics import Metric, compare, group_difference, interval, ratio
from wuxia_core.evaluate.writing import generate
from wuxia_core.model import add_adapter, load_base
from wuxia_core.write import training_precision

TEXT = "剑光一闪，那人已到了门外。雨下得很大，檐下的灯笼在风里摇晃，照见他腰间一截断剑。"


@pytest.fixture(scope="module")
def base():
    return load_base("data/tiny_base", torch.float32).eval()


def test_a_uniform_model_needs_log2_of_its_vocabulary_a_token(base, tokenizer):
    uniform = load_base("data/tiny_base", torch.float32).eval()
    with torch.no_grad():
        uniform.get_input_embeddings().weight.zero_()  # tied: every logit is 0
    texts = [TEXT * 20, TEXT]
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids)
    expected = tokens * math.log2(8192) / sum(map(len, texts))
    assert bits_per_char(uniform, tokenizer, texts, window=64) == pytest.approx(expected, rel=1e-6)


def test_a_short_text_equals_a_plain_forward_pass(base, tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    with torch.no_grad():
        logits = base(torch.tensor([ids])).logits[0, :-1]
    nats = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    expected = nats / math.log(2) / len(TEXT)
    assert bits_per_char(base, tokenizer, [TEXT]) == pytest.approx(expected, rel=1e-5)


def test_batches_and_neighbours_change_nothing(base, tokenizer):
    texts = [TEXT * 7, TEXT, TEXT[:20] * 11]
    together = document_bits(base, tokenizer, texts, 64)
    alone = [document_bits(base, tokenizer, [text], 64) for text in texts]
    assert np.allclose(together["bits"], [table["bits"].iloc[0] for table in alone], rtol=1e-5)
    assert together["chars"].tolist() == [len(text) for text in texts]


def test_characters_are_counted_after_composition(base, tokenizer):
    assert document_bits(base, tokenizer, ["e\u0301"], 64)["chars"].tolist() == [1]


@pytest.fixture
def adapted():
    """Make an adapter of noise on the bundled base, by its precision."""

    def adapt(dtype):
        model = add_adapter(load_base("data/tiny_base", dtype), ModelConfig(), 1).eval()
        generator = torch.Generator().manual_seed(0)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.data = 0.02 * torch.randn(weights.shape, generator=generator)
        return model

    return adapt


def test_it_computes_in_the_precision_of_the_training(adapted, tokenizer):
    model, dtypes = adapted(torch.bfloat16), set()
    inputs = {"input_ids": torch.tensor([tokenizer(TEXT).input_ids])}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as accelerate does
        expected = model(**inputs).logits
    lora_a = next(
        module for name, module in model.named_modules() if name.endswith("lora_A.default")
    )
    lora_a.register_forward_pre_hook(lambda _, taken: dtypes.add(taken[0].dtype))
    with torch.no_grad(), training_precision(model):
        assert model(**inputs).logits.equal(expected)
    assert dtypes == {torch.bfloat16}  # never copied to float32
    model = adapted(torch.float32)
    with torch.no_grad(), training_precision(model):
        found = model(**inputs).logits
    assert found.equal(model(**inputs).logits) and found.dtype == torch.float32


def test_a_scorecard_needs_no_more_memory_than_the_training(
    adapted, tokenizer, config, monkeypatch
):
    """Logits, keys and values are no more than logits there, tokens no more than a window."""
    most = 2**21  # of 8,192 a token
    for module in (scoring, context):
        monkeypatch.setattr(module, "LOGITS", most)
    config.data.max_length, config.training.per_device_train_batch_size = 512, 1
    config.evaluation.max_documents, config.evaluation.minutes = 1, 1e-9  # a few items of each kind
    run_of = EvalContext(adapted(torch.float32), tokenizer, mix(config), config)
    inner = run_of.model.get_base_model()
    logits, tokens, cached = [], [], []

    def note(module, arguments, given, returned):
        if cache := returned.past_key_values:
            cached.append(sum(2 * layer.keys.numel() for layer in cache.layers))
        else:
            tokens.append(given["input_ids"].numel())

    inner.lm_head.register_forward_hook(lambda _, __, output: logits.append(output.numel()))
    inner.model.register_forward_hook(note, with_kwargs=True)
    score_bits(run_of), score_recovery(run_of), score_questions(run_of), score_extraction(run_of)
    generate(run_of, [TEXT] * 12, seed=0)
    assert most / 2 < max(logits) <= most
    assert most / 2 < max(cached) <= most
    assert max(tokens) <= 512


def test_rows_with_too_many_labels_are_split(base, tokenizer, monkeypatch):
    whole = document_bits(base, tokenizer, [TEXT * 9, TEXT], 128)
    monkeypatch.setattr(scoring, "LOGITS", 8192 * 20)
    assert document_bits(base, tokenizer, [TEXT * 9, TEXT], 128)["bits"].to_numpy() == (
        pytest.approx(whole["bits"].to_numpy(), rel=1e-5)
    )


def test_a_seed_is_for_the_models_own_device(adapted, tokenizer, config, monkeypatch):
    """Two cards beside a model on the CPU are not asked for; torch would warn of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    context = EvalContext(adapted(torch.float32), tokenizer, None, config)
    with warnings.catch_warnings(action="error"):
        before = torch.get_rng_state()
        assert generate(context, ["剑光"], 1) == generate(context, ["剑光"], 1)
    assert torch.get_rng_state().equal(before)


def test_empty_texts_are_refused(base, tokenizer):
    with pytest.raises(DataError, match="empty"):
        bits_per_char(base, tokenizer, [""])
    with pytest.raises(DataError, match="empty"):
        bits_per_char(base, tokenizer, [])


BITS = Metric("bits_per_char", "bits/character", "wuxia", ratio("bits", "chars"))


def scores(bits):
    return pd.DataFrame({"bits": bits, "chars": [100] * len(bits)})


def test_the_difference_and_its_interval():
    rng = np.random.default_rng(0)
    base = rng.normal(600, 100, 40)
    row = compare(BITS, scores(base), scores(base - rng.normal(20, 5, 40)), seed=0)
    assert row["delta"] == pytest.approx(-0.2, abs=0.03)
    assert row["low"] < row["delta"] < row["high"] < 0
    assert row["high"] - row["low"] < 0.06  # paired: the spread between documents falls out
    same = compare(BITS, scores(base), scores(base), seed=0)
    assert (same["delta"], same["low"], same["high"], same["n"]) == (0, 0, 0, 40)


def test_the_interval_of_few_is_wider_as_students_is():
    drawn = np.random.default_rng(0).normal(0, 1, 1_000_000)
    for n, expected in ((10, 2.262 * (10 / 9) ** 0.5), (1000, 1.963)):
        assert interval(drawn, n) == pytest.approx((-expected, expected), abs=0.02)


@pytest.mark.parametrize(("worse", "found"), [(5, False), (6, True), (0, False)])
def test_what_a_sign_test_could_not_tell_is_not_told(worse, found):
    """2 / 2^5 is over 5 %, 2 / 2^6 is not."""
    base, tuned = (scores([500.0] * (40 - n) + [600.0] * n) for n in (0, worse))
    row = compare(BITS, base, tuned, seed=0)
    assert (row["low"] > 0) == found


def test_too_few_documents_give_null_and_a_reason():
    row = compare(BITS, scores([1.0] * 4), scores([1.0] * 4), seed=0)
    assert row["delta"] is None and row["base"] is None
    assert row["reason"] == "n = 4, fewer than 6"


def test_a_difference_between_groups_is_of_their_ratios():
    """Base: 6/4 trained less 2/4 held out; tuned: 2/4 less 2/4."""
    base = pd.DataFrame({"bits": [2, 4, 1, 1] * 3, "chars": 2})
    base["trained"] = [True, True, False, False] * 3
    tuned = base.assign(bits=1)
    statistic, once = group_difference("trained", "bits", "chars"), np.ones((1, 12))
    assert statistic(base, once) == [1.0] and statistic(tuned, once) == [0.0]
    assert statistic(base, np.array([[2.0, 0, 1, 0] * 3])) == [0.5]
    memorisation = Metric("memorisation", "bits", "wuxia", statistic)
    assert compare(memorisation, base, tuned, seed=0)["delta"] == -1
    row = compare(memorisation, base[:8], tuned[:8], seed=0)
    assert row["delta"] is None and row["reason"] == "n = 8, fewer than 6 of one kind"


def test_nothing_is_found_where_nothing_changed():
    """Of 60 comparisons of noise with noise about one in twenty may be called a change."""
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(60):
        base, tuned = (scores(rng.normal(600, 50, 40)) for _ in range(2))
        row = compare(BITS, base, tuned, seed)
        found += not row["low"] <= 0 <= row["high"]
    assert found <= 8


@pytest.fixture
def scorecard(short_run):
    return json.loads((short_run[0] / "scorecard.json").read_text(encoding="utf-8"))


@pytest.fixture
def full_card(sample_run):
    return json.loads((sample_run[0] / "scorecard.json").read_text(encoding="utf-8"))


def test_the_scorecard_of_a_run(scorecard):
    assert {"base", "adapter", "objective", "metrics", "passages", "copied"} <= set(scorecard)
    rows = {(row["source"], row["name"]): row for row in scorecard["metrics"]}
    assert len(rows) == len(scorecard["metrics"])
    for row in rows.values():
        if row["delta"] is None:
            assert row["reason"] and row["low"] is None
            continue
        assert row["low"] <= row["delta"] <= row["high"]
        assert row["delta"] == pytest.approx(row["tuned"] - row["base"])
        assert row["n"] >= 5 and row["unit"]
    assert 5 < rows["wuxia", "bits_per_char"]["base"] < 9
    assert rows["questions", "wits"]["verdict"] == "cannot tell"  # the bundled model knows nothing
    wanted = "memorisation burrows_delta style_strength distinct_2 repetition copied_length "
    assert {name for _, name in rows} >= set((wanted + "extraction_near").split())


@pytest.mark.slow
def test_the_sample_run_learns_what_it_is_trained_on(full_card):
    rows = {(row["source"], row["name"]): row for row in full_card["metrics"]}
    assert rows["wuxia", "masked_loss"]["high"] < 0
    assert rows["wuxia", "bits_per_char"]["high"] < 0


def test_strata_add_up_to_all_masked_tokens(scorecard):
    rows = {row["name"]: row for row in scorecard["metrics"] if row["source"] == "wuxia"}
    parts = [rows[f"masked_accuracy, {name}"] for name in ("single", "span")]
    whole = rows["masked_accuracy"]
    for side in ("base", "tuned"):
        low, high = sorted(part[side] for part in parts)
        assert low <= whole[side] <= high, side


def test_passages_are_written_by_both_after_the_same_prompts(scorecard):
    assert len(scorecard["passages"]) >= 15
    for passage in scorecard["passages"]:
        assert passage["base"] != passage["tuned"] and len(passage["tuned"]) > 80
    assert any(passage["human"] for passage in scorecard["passages"])


@pytest.fixture
def hurried(sample_run, tmp_path):
    """The sample's run folder, with hardly any time to evaluate it."""
    folder = tmp_path / "run"
    shutil.copytree(sample_run[0], folder)
    (folder / "scorecard.json").unlink()
    config = load_config(folder / "config.yaml", ["evaluation.minutes=0.001"])
    config.save(folder / "config.yaml")
    return folder


@pytest.mark.slow
def test_an_evaluation_that_was_cut_off_goes_on(hurried, full_card):
    shown = []

    def cut_off(text):
        shown.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(hurried, echo=cut_off)  # passages come first
    assert full_card["passages"][0]["tuned"][:20] in shown[0]
    assert not (hurried / "scorecard.json").exists()
    (kept,) = (hurried / PARTS).rglob("*.json")
    written = json.loads(kept.read_text(encoding="utf-8"))
    assert written == full_card["passages"][: len(written)]  # the same inputs, the same passages
    assert 5 <= len(written) <= len(full_card["passages"])
    written[0]["human"] = "not written anew"
    kept.write_text(json.dumps(written), encoding="utf-8")
    assert evaluate(hurried, echo=shown.append)["passages"] == written
    assert not (hurried / PARTS).exists()


def test_a_damaged_part_of_an_evaluation_is_made_anew(tmp_path):
    (tmp_path / "bits.json").touch()
    assert [_read_or_make(tmp_path, "bits", lambda n=n: n) for n in (5, 6)] == [5, 5]


@pytest.mark.slow
def test_a_quick_look_measures_bits_and_is_used_again(hurried, full_card, capsys):
    assert main([str(hurried), "--quick"]) == 0
    printed = capsys.readouterr().out
    assert full_card["passages"][0]["prompt"] in printed and "bits a character" in printed
    assert not (hurried / "scorecard.json").exists()
    assert {path.stem for path in (hurried / PARTS).rglob("*.json")} == {"written", "bits"}
    with pytest.raises(SystemExit):
        main([str(hurried), "--quick", "--gate"])


def changed(scorecard, name, source, **figures):
    """Copy a scorecard with some figures of one row put in."""
    other = copy.deepcopy(scorecard)
    row = next(r for r in other["metrics"] if (r["name"], r["source"]) == (name, source))
    row.update(figures)
    return other


MISSING = dict.fromkeys(("base", "tuned", "delta", "low", "high")) | {"reason": "n = 2"}


@pytest.mark.parametrize(
    ("line", "name", "source", "figures", "said"),
    [
        (0, "bits_per_char", "wuxia", {}, ("武侠", "easier")),
        (0, "bits_per_char", "wuxia", {"delta": 0.2, "low": 0.1, "high": 0.3},
         ("HARDER", "+0.200", "[+0.100, +0.300]", "training.learning_rate")),
        (0, "bits_per_char", "wuxia", {"low": -0.1, "high": 0.1}, ("no sure change", "train")),
        (0, "bits_per_char", "wuxia", MISSING, ("n = 2", "data.val_ratio")),
        (1, "bits_per_char", "general", {}, ("no worse", "margin 0.02")),
        (1, "bits_per_char", "general", {"verdict": "worse"}, ("WORSE", "data.general_ratio")),
        (1, "bits_per_char", "general", {"verdict": "not shown"}, ("cannot tell",)),
        (1, "bits_per_char", "general", MISSING, ("n = 2", "data.general_file")),
        (2, "copied_length", "training", {}, ("nothing copied", "30")),
        (2, "copied_length", "training", MISSING, ("n = 2", "evaluation.minutes")),
        (2, "extraction_near", "training", {"delta": 0.5, "low": 0.2, "high": 0.8},
         ("BY HEART", "+0.50", "epochs")),
    ],
)  # fmt: skip
def test_three_sentences_say_what_was_learned_forgotten_and_copied(
    scorecard, line, name, source, figures, said
):
    words = closing_words(changed(scorecard, name, source, **figures))
    sentences = words.partition("\n\n")[0].splitlines()
    assert len(sentences) == 3
    assert all(word in sentences[line] for word in said)


def test_closing_words_show_seven_rows_two_passages_and_what_is_next(scorecard):
    _, table, passages, after = closing_words(scorecard).split("\n\n")
    assert len(table.splitlines()) == 1 + 7
    assert "n = 2" in closing_words(changed(scorecard, "style_strength", "wuxia", **MISSING))
    styles = pd.DataFrame(scorecard["texts"])
    both = styles[styles["writer"] != "human"].pivot(index="number", columns="writer")["style"]
    chosen = scorecard["passages"][(both["tuned"] - both["base"]).idxmax()]
    assert " ".join(chosen["prompt"].split())[:20] in passages and "5 M parameters" in passages
    assert scorecard["adapter"] in after and "--gate" in after and "training.objective=clm" in after
    assert "training.objective" not in closing_words(scorecard | {"objective": "mixed"})
    assert "5 M" not in closing_words(scorecard | {"base": "Qwen/Qwen3-8B"})
    assert "page.html" in closing_words(scorecard, "page.html")
    for row in scorecard["texts"]:
        row["style"] = None
    assert scorecard["passages"][0]["prompt"] in closing_words(scorecard)
    copied = scorecard | {"copied": [{"length": 41, "title": "某书 第一章"}]}
    assert "COPIED: 41 characters in a row of 某书 第一章" in closing_words(copied)


@pytest.mark.long
def test_without_held_out_text_there_are_reasons_and_the_gate_refuses(hurried, tmp_path):
    sets = ["data.val_ratio=0", f"data.processed_data_file={tmp_path / 'all'}"]
    config = load_config(hurried / "config.yaml", sets)
    run.write_setup(config, mix(config), hurried)
    scorecard = evaluate(hurried)
    rows = {(row["source"], row["name"]): row for row in scorecard["metrics"]}
    for name in ("bits_per_char", "masked_loss", "memorisation"):
        assert rows["wuxia", name]["delta"] is None and rows["wuxia", name]["reason"]
    assert rows["wuxia", "distinct_2"]["n"] == 10 and "human" not in rows["wuxia", "distinct_2"]
    assert any(
        "extraction_near was not measured" in said
        for said in gate_failures(scorecard, config.evaluation)
    )


def test_the_time_of_a_scorecard_is_a_tenth_of_the_trainings(tmp_path):
    assert affordable_minutes(tmp_path) == 20
    rows = [("started", 0, 0), (None, 9, 36_000), (None, 12, 50_000), ("resumed", 9, 900_000)]
    for event, step, time in [*rows, (None, 20, 900_000 + 36_000)]:
        run.append(tmp_path, {"event": event, "step": step, "time": time})
    assert affordable_minutes(tmp_path) == 120  # neither the pause nor what was done again counts


def test_strength_0_is_the_base_and_1_the_adapter(adapted, tokenizer, config):
    run_of = EvalContext(adapted(torch.float32), tokenizer, mix(config), config)
    rows = frontier(run_of)
    assert [row["strength"] for row in rows] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    for source in ("wuxia", "general"):
        texts = openings(run_of, source)
        plain = partial(bits_per_char, run_of.model, tokenizer, texts, config.data.max_length)
        found = [row[source] for row in rows]
        assert found[::4] == pytest.approx(run_of.base_and_tuned(plain))
        assert len(set(found)) == len(found)
    assert all(row["copied"] > 0 for row in rows)


def test_best_strength_learns_most_with_general_text_kept_and_nothing_copied():
    columns = ("strength", "wuxia", "general", "copied")
    figures = [(0, 7, 8, 5), (0.5, 6.5, 8.01, 6), (1, 6, 8.05, 6), (1.5, 5.5, 7.9, 40)]
    rows = [dict(zip(columns, row, strict=True)) for row in figures]
    assert best_strength(rows, margin=0.02, most_copied=30) == 0.5
    assert best_strength(rows, margin=0.1, most_copied=30) == 1
    assert best_strength(rows, margin=0.1, most_copied=50) == 1.5
    assert best_strength([], margin=0.1, most_copied=50) is None
    unfinished = [row for row in rows if row["strength"] != 1]  # time ran out
    assert best_strength(unfinished, margin=0.1, most_copied=50) is None


def test_a_budget_of_time_cuts_the_samples(config, caplog):
    config.evaluation.minutes = 1e-9
    context = EvalContext(None, None, None, config)
    assert list(context.within_budget("questions asked", range(10), 4, share=0.5)) == [range(4)]
    assert "questions asked: 4 of 10 within evaluation.minutes 1e-09" in caplog.text
    config.evaluation.minutes = None
    assert len(list(context.within_budget("questions asked", range(10), 4, share=0.5))) == 3


def test_the_gate_names_what_was_copied_and_what_was_lost(scorecard, config):
    assert list(gate_failures(scorecard, config.evaluation)) == []
    bad = copy.deepcopy(scorecard)
    bad["copied"] = [{"length": 41, "title": "某书 第一章", "generated": "…【抄来的】…"}]
    rows = {row["name"]: row for row in bad["metrics"]}
    rows["extraction_near"]["tuned"], rows["wits"]["verdict"] = 0.5, "worse"
    general = next(row for row in bad["metrics"] if row["source"] == "general")
    assert general["verdict"] == "kept"
    general["verdict"] = "worse"
    copied, extracted, forgotten, lost = gate_failures(bad, config.evaluation)
    assert "general text got WORSE" in forgotten
    assert "41 characters in a row of 某书 第一章" in copied and "抄来的" in copied
    assert "50% more" in extracted and "wits fell" in lost
    general |= {"delta": None, "verdict": "not measured", "reason": "n = 0, fewer than 6"}
    assert any(
        "general bits_per_char was not measured" in s for s in gate_failures(bad, config.evaluation)
    )


def test_the_best_strength_follows_its_limits_without_a_measurement(short_run, tmp_path):
    folder = shutil.copytree(short_run[0], tmp_path / "run")
    load_config(folder / "config.yaml", ["evaluation.max_copied=1"]).save(folder / "config.yaml")
    before = (folder / "scorecard.json").read_bytes()
    assert evaluate(folder)["best_strength"] is None  # each copies a character at least
    assert (folder / "scorecard.json").read_bytes() == before


@pytest.mark.long
def test_the_gate_ends_with_3(hurried, capsys):
    config = load_config(hurried / "config.yaml", ["evaluation.max_copied=1"])
    config.save(hurried / "config.yaml")
    assert main([str(hurried), "--gate"]) == 3
    assert "not to be published" in capsys.readouterr().err
    assert main([str(hurried / "logs")]) == 3
    assert "no finished adapter" in capsys.readouterr().err
