"""The script that makes a base model, with few steps of its real shape."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_bad_input import load
from wuxia_core.config import PROJECT
from wuxia_core.model import load_tokenizer

pytestmark = pytest.mark.slow
SMALL = ["--tokens=384", "--batch=2", "--window=32", "--every=2"]  # six steps, three measurements


@pytest.fixture
def pretrain(monkeypatch):
    """Run the script in this process; signals are handled as before when the test is over."""
    threads, before = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    torch.set_num_threads(1)
    yield load(PROJECT / "data" / "tiny_base" / "pretrain.py").main
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        if handler != signal.getsignal(number):
            signal.signal(number, handler)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def texts(tmp_path):
    """Two of the sample's books, one of which is held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in sorted((PROJECT / "data" / "sample").glob("*.txt"))[:2]:
        shutil.copy(path, folder)
    return str(folder)


def rows(folder):
    return [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]


def test_a_stopped_training_ends_with_the_same_weights(tmp_path, texts, pretrain):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain([texts, str(whole), *SMALL]) == 0

    def stop():
        while not (stopped / "pretrain.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert pretrain([texts, str(stopped), *SMALL]) == 75
    assert len(rows(stopped)) < 3
    assert pretrain([texts, str(stopped), *SMALL]) == 0
    assert [row["step"] for row in rows(stopped)] == [2, 4, 6]
    one, other = (folder / "model.safetensors" for folder in (whole, stopped))
    assert one.read_bytes() == other.read_bytes()


def test_what_it_makes_is_a_base(tmp_path, texts, pretrain):
    out = tmp_path / "out"
    assert pretrain([texts, str(out), *SMALL]) == 0
    bits = [row["held_out_bits_per_char"] for row in rows(out)]
    assert bits[-1] < bits[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), load_tokenizer(str(out))
    assert (
        10e6 < model.num_parameters() < 12e6 and (out / "model.safetensors").stat().st_size < 24e6
    )
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|mask|>"]) == [0, 1]
    text = "剑光一闪，他退了半步。\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_stops_where_nothing_gets_better(tmp_path, texts, pretrain):
    """A rate of nearly 0 leaves every weight as it is in bfloat16, and the bits with them."""
    out = tmp_path / "out"
    few = ["--tokens=2000", "--every=1", "--lr=1e-30", "--patience=2"]
    assert pretrain([texts, str(out), *SMALL, *few]) == 0
    assert [row["step"] for row in rows(out)] == [1, 2, 3]


def test_a_book_that_is_not_there_cannot_be_left_out(tmp_path, texts, pretrain, capsys):
    assert pretrain([texts, str(tmp_path / "out"), "--exclude", "绿牡丹"]) == 3
    assert "绿牡丹" in capsys.readouterr().err
