import importlib.util
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize_scalar

from wuxia_core.evaluate.__main__ import main
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.scoring import QUESTIONS, answers, questions, questions_verdict
from wuxia_core.model import load_base

GOOD = {
    "id": "a1",
    "kind": "knowledge",
    "question": "墨用哪个量词？",
    "options": ["匹", "锭", "盏", "顶"],
    "answer": 1,
    "reason": "一锭墨。",
}
HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def base():
    return load_base("data/tiny_base", torch.float32).eval()


@pytest.fixture
def context(base, tokenizer, config):
    return EvalContext(base, tokenizer, None, config)


def write(path, *rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_our_questions_are_as_they_should_be():
    ours = questions()
    kinds = Counter(question.kind for question in ours)
    assert len(ours) >= 200 and kinds["arithmetic"] <= 20 and len(kinds) == 4
    assert len({question.question for question in ours}) == len(ours)
    places = Counter(question.answer for question in ours)
    assert max(places.values()) < 0.3 * len(ours) and set(places) == set(range(4))
    assert len({question.id for question in ours}) == len(ours)
    for question in ours:
        assert len(set(question.options)) == 4 and all(question.options) and question.reason


def some(n):
    """Choose short questions and long ones."""
    ours = questions()
    return ours[:: len(ours) // n]


def test_a_score_equals_a_plain_forward_pass(context, base, tokenizer):
    asked = some(3)
    for question, row in zip(asked, answers(context, asked).itertuples(), strict=True):
        prompt = tokenizer(f"问题：{question.question}\n答案：", add_special_tokens=False).input_ids
        scores = []
        for option in question.options:
            tail = tokenizer(option, add_special_tokens=False).input_ids
            ids = torch.tensor([[tokenizer.eos_token_id, *prompt, *tail]])
            with torch.no_grad():
                log_p = base(ids).logits[0, :-1].log_softmax(-1)
            taken = log_p.gather(1, ids[0, 1:, None])[-len(tail) :].sum().item()
            scores.append(taken / len(option))
        right = scores.pop(question.answer)
        assert row.margin == pytest.approx(right - max(scores), abs=1e-4)
        assert row.right == (right > max(scores))


def test_of_a_uniform_model_only_tokens_for_characters_count(tokenizer, config):
    uniform = load_base("data/tiny_base", torch.float32).eval()
    with torch.no_grad():
        uniform.get_input_embeddings().weight.zero_()  # tied: every logit is 0
    options = ["中国", "剑", "一闪一闪", "江湖人士"]
    tokens = [len(ids) for ids in tokenizer(options, add_special_tokens=False).input_ids]
    scores = [-n * np.log(8192) / len(text) for n, text in zip(tokens, options, strict=True)]
    asked = [SimpleNamespace(**GOOD | {"options": options, "answer": n}) for n in range(4)]
    expected = [score - max(scores[:n] + scores[n + 1 :]) for n, score in enumerate(scores)]
    found = answers(EvalContext(uniform, tokenizer, None, config), asked)["margin"]
    assert found.to_numpy() == pytest.approx(expected, abs=1e-4)


def test_batches_change_nothing(context):
    asked = some(10)
    together = answers(context, asked)
    backwards = answers(context, asked[::-1])["margin"].to_numpy()
    context.config.data.max_length = 8  # a row at a time
    by_three = answers(context, asked)
    assert together["margin"].to_numpy() == pytest.approx(by_three["margin"].to_numpy(), abs=1e-4)
    assert together.drop(columns="margin").equals(by_three.drop(columns="margin"))
    assert backwards[::-1] == pytest.approx(together["margin"].to_numpy(), abs=1e-4)


def sides(both, lost, gained, neither):
    """Make base and tuned from how many questions both, only base, only tuned, none had right."""
    marks = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, lost, gained, neither], axis=0)
    return (pd.DataFrame({"right": column}) for column in marks.T)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((110, 0, 0, 90), "kept"),
        ((110, 6, 0, 84), "kept"),  # fewer for certain, by a trifle
        ((110, 12, 8, 70), "kept"),
        ((110, 20, 10, 60), "not shown"),
        ((110, 10, 20, 60), "not shown"),
        ((80, 40, 5, 75), "worse"),
        ((80, 5, 40, 75), "not shown"),  # far better: not the same
        ((43, 20, 0, 137), "worse"),  # 63 of 200 are just enough
        ((43, 19, 0, 138), "cannot tell"),
        ((50, 11, 40, 99), "cannot tell"),  # chance is 50, and two standard errors are 12.2
        ((16, 0, 0, 4), "not shown"),  # too few questions to tell
    ],
)
def test_verdicts(counts, expected):
    row = questions_verdict(*sides(*counts), 0.06)
    assert row["verdict"] == expected and row["n"] == sum(counts)
    assert ("reason" in row) == (expected == "cannot tell")
    assert (row["name"], row["margin"]) == ("wits", 0.06) and "90 % interval" in row["unit"]
    assert row["low"] < row["delta"] < row["high"]
    assert row["tuned"] == (counts[0] + counts[2]) / sum(counts)
    assert row["delta"] == pytest.approx(row["tuned"] - row["base"])


def test_the_interval_where_nothing_changed():
    # z² = n·d / (1 - d) = 1.6449² gives d = 2.7057 / (n + 2.7057)
    row = questions_verdict(*sides(120, 0, 0, 80), 0.06)
    assert (-row["low"], row["high"]) == pytest.approx((2.7057 / 202.7057,) * 2, abs=1e-4)


@pytest.mark.parametrize(("lost", "gained"), [(12, 3), (30, 30), (7, 0)])
def test_the_interval_ends_where_a_score_test_refuses(lost, gained):
    n = 200
    row = questions_verdict(*sides(100, lost, gained, 100 - lost - gained), 0.06)
    for delta in (row["low"], row["high"]):

        def unlikely(p, delta=delta):  # p of lost; the likeliest one by search, not by formula
            p_gained = p + delta
            same = (n - lost - gained) * np.log(1 - p - p_gained)
            return -(lost * np.log(p) + gained * np.log(p_gained) + same)

        bounds = (max(0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9)
        p = minimize_scalar(unlikely, bounds=bounds, options={"xatol": 1e-10}).x
        variance = (2 * p + delta - delta**2) / n
        assert abs((gained - lost) / n - delta) / variance**0.5 == pytest.approx(1.645, abs=0.01)


@pytest.mark.parametrize("gained", [0.0, 0.03, 0.08])
def test_a_loss_of_the_margin_is_called_kept_one_time_in_twenty(gained):
    rng = np.random.default_rng(0)
    shares = [0.5, gained + 0.06, gained, 0.44 - 2 * gained]
    drawn = rng.multinomial(219, shares, 1000)
    kept = [questions_verdict(*sides(*counts), 0.06)["verdict"] == "kept" for counts in drawn]
    assert np.mean(kept) < 0.05 + 2 * (0.05 * 0.95 / 1000) ** 0.5


@pytest.mark.skipif(HARNESS, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "--harness", "cmmlu"]) == 2
    assert "[harness]" in capsys.readouterr().err


def own_task(folder, data):
    """Write a task over a question file that asks as `answers` does."""
    (folder / "own.yaml").write_text(
        f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|endoftext|>问题：{{{{question}}}}\\n答案："
target_delimiter: ""
doc_to_choice: options
doc_to_target: answer
""",
        encoding="utf-8",
    )


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
def test_the_harness_agrees_on_a_task_of_ones_own(
    context, sample_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if '"kind": "reading"' in line][:12]
    path = write(tmp_path / "q.jsonl", *rows)
    own_task(tmp_path, path)
    command = [str(sample_run[0]), "--harness"]
    assert main([*command, str(tmp_path / "own.yaml")]) == 0
    table = capsys.readouterr().out.partition("tuned\n")[0]
    found = next(line for line in table.splitlines() if "|acc_norm|" in line).split("|")
    expected = answers(context, questions(path))["right"]
    assert f"{expected.mean():.4f}" in found and f"{expected.std() / 12**0.5:.4f}" in found[-2]
    assert main([*command, "other"]) == 2


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
def test_data_that_cannot_be_had(sample_run, tmp_path, capsys):
    own_task(tmp_path, "unused")
    task = (tmp_path / "own.yaml").read_text(encoding="utf-8")
    task = task.replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tmp_path / "own.yaml").write_text(task, encoding="utf-8")
    assert main([str(sample_run[0]), "--harness", str(tmp_path / "own.yaml")]) == 5
    assert "HF_ENDPOINT" in capsys.readouterr().err
