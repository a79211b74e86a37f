import time
from dataclasses import replace

import nbformat
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from peft import LoraConfig, get_peft_model

from wuxia_core import report
from wuxia_core.model import load_base, load_tokenizer
from wuxia_core.show import WritingDesk, strengths_table
from wuxia_core.write import Sampling, stream

PROMPT = "剑光一闪，"
SHORT = Sampling(tokens=6, seed=3)


@pytest.fixture(scope="session")
def writer():
    """An adapter that was never trained, but changes what is written."""
    lora = LoraConfig(target_modules="all-linear", lora_alpha=64, init_lora_weights=False)
    base = load_base("data/tiny_base", torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, lora).eval()
    for name, weight in model.named_parameters():
        weight.data *= 3 if "lora_B" in name else 1
    return model, load_tokenizer("data/tiny_base")


@pytest.fixture
def desk(writer):
    return WritingDesk({"tuned": lambda: writer}, PROMPT, SHORT)


def press(button, desk):
    """Click, and wait until the desk has written."""
    button.click()
    deadline = time.monotonic() + 60
    while desk.write.disabled:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_passages_are_those_of_write(desk, writer):
    press(desk.write, desk)
    base = stream(*writer, PROMPT, SHORT, strength=0)
    tuned = stream(*writer, PROMPT, SHORT)
    assert base != tuned
    press(desk.keep, desk)
    assert desk.kept.to_dict("records") == [
        {"prompt": PROMPT, "strength": 1, "seed": 3, "tokens": 6, "temperature": 0.9}
        | {"base": base, "tuned": tuned}
    ]
    assert desk.view.value.index(">base<") < desk.view.value.index(">tuned<")
    assert "strength 1 · seed 3 · tokens 6 · temperature 0.9" in desk.view.value


def test_text_is_seen_as_it_is_made(desk):
    seen = []
    desk.view.observe(lambda change: seen.append(change["new"]), "value")
    press(desk.write, desk)
    lengths = [len(page) for page in seen]
    assert len(set(lengths)) > SHORT.tokens and lengths == sorted(lengths)


def test_the_strength_changes_tuned_alone(desk, writer):
    press(desk.write, desk)
    desk.keep.click()
    desk.strength.value = 2
    press(desk.write, desk)
    desk.keep.click()
    strong, trained = desk.kept.to_dict("records")  # the newest first
    assert strong["base"] == trained["base"] and strong["tuned"] != trained["tuned"]
    assert (strong["strength"], trained["strength"]) == (2, 1)
    assert strong["tuned"] == stream(*writer, PROMPT, SHORT, strength=2)


def test_what_is_kept_has_the_settings_it_was_written_with(desk):
    press(desk.write, desk)
    desk.strength.value, desk.seed.value, desk.prompt.value = 0.5, 9, "夜雨"
    desk.keep.click()
    assert desk.kept.loc[0, ["prompt", "strength", "seed"]].tolist() == [PROMPT, 1, 3]
    assert desk.keep.disabled and PROMPT in desk.shelf.value


def test_a_new_seed_writes_another_passage(desk, monkeypatch):
    press(desk.write, desk)
    desk.keep.click()
    monkeypatch.setattr("random.randrange", lambda stop: stop - 1)
    press(desk.new_seed, desk)
    desk.keep.click()
    assert desk.seed.value == 999 and desk.kept["seed"].tolist() == [999, 3]
    assert desk.kept["base"].nunique() == 2


def test_the_same_is_not_written_twice(desk, monkeypatch):
    press(desk.write, desk)
    before = desk.view.value
    monkeypatch.setattr("wuxia_core.show.interactive.stream", None)
    press(desk.write, desk)
    assert desk.view.value == before


def test_it_can_be_stopped(writer):
    desk = WritingDesk({"tuned": lambda: writer}, PROMPT, Sampling(tokens=1000))
    assert desk.stop.disabled and desk.keep.disabled
    desk.view.observe(lambda _: desk.stop.click(), "value")
    press(desk.write, desk)
    assert "stopped" in desk.status.value and PROMPT in desk.view.value
    assert desk.stop.disabled and not desk.write.disabled
    desk.keep.click()  # what was written until then
    assert desk.kept.loc[0, "base"] and desk.kept.loc[0, "tuned"] == ""


def test_another_adapter_has_a_column_of_its_own(writer):
    desk = WritingDesk({"tuned": lambda: writer, "other": lambda: writer}, PROMPT, SHORT)
    press(desk.write, desk)
    desk.keep.click()
    assert list(desk.kept)[-3:] == ["base", "tuned", "other"]
    assert desk.kept.loc[0, "other"] == desk.kept.loc[0, "tuned"] != desk.kept.loc[0, "base"]


def test_what_cannot_be_written_is_said_and_can_be_mended(desk):
    desk.prompt.value = "剑" * 3000
    press(desk.write, desk)
    assert "shorten it" in desk.status.value and desk.keep.disabled
    desk.prompt.value = PROMPT
    press(desk.write, desk)
    assert "shorten it" not in desk.status.value and not desk.keep.disabled


ATTACK = "<img src=x onerror=alert(1)>\u202e$$x$$"


def test_text_is_escaped(desk, monkeypatch):
    def attacks(model, tokenizer, prompt, sampling, echo, strength):
        echo(ATTACK)
        return ATTACK

    monkeypatch.setattr("wuxia_core.show.interactive.stream", attacks)
    desk.prompt.value = ATTACK
    seen = []
    desk.view.observe(lambda change: seen.append(change["new"]), "value")
    press(desk.write, desk)
    desk.keep.click()
    for page in (*seen, desk.shelf.value, desk._repr_html_()):
        assert "<img" not in page and "\u202e" not in page
        assert "&lt;img src=x onerror" in page and "⟨U+202E⟩" in page and "mathjax_ignore" in page


def test_without_widgets_settings_passages_and_what_was_kept_are_shown(desk, tmp_path):
    press(desk.write, desk)
    desk.keep.click()
    bundle, _ = DisplayFormatter().format(desk)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    output = nbformat.v4.new_output("execute_result", bundle)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    nbformat.write(notebook, tmp_path / "x.ipynb")
    page = report.write_html(tmp_path / "x.ipynb").read_text(encoding="utf-8")
    assert f"prompt {PROMPT}; strength 1.0; seed 3" in page and "<script" not in page
    assert desk.view.value in page and desk.shelf.value in page


def test_a_table_of_strengths_has_what_write_writes(writer):
    sampling = replace(SHORT, temperature=0)
    rows = strengths_table(writer, [PROMPT, "夜雨"], sampling)
    assert list(rows) == ["prompt", "0 (base)", "0.5", "1 (as trained)", "1.5"]
    assert rows["prompt"].tolist() == [PROMPT, "夜雨"]
    wanted = [stream(*writer, "夜雨", sampling, strength=strength) for strength in (0, 0.5, 1, 1.5)]
    assert rows.loc[1].tolist()[1:] == wanted and len(set(wanted)) > 1
