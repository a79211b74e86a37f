import json
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerState

from wuxia_core import run
from wuxia_core import train as stage
from wuxia_core.config import PROJECT, ModelConfig
from wuxia_core.errors import DeviceLost, MachineError, NonFiniteError, RankLost
from wuxia_core.masking import masked_this_epoch
from wuxia_core.mixing import mix
from wuxia_core.model import add_adapter, load_base
from wuxia_core.preflight import save_steps
from wuxia_core.run import append, read_rows
from wuxia_core.trainer import (
    BEST_METRIC,
    EpochSampler,
    KeepBest,
    StopOnNonFinite,
    StopOnSignal,
    peak_memory,
)

NONE_PACKED = np.zeros(50, bool)


def test_the_order_depends_on_seed_and_epoch_and_carries_the_epoch():
    sampler = EpochSampler(NONE_PACKED, seed=1, batch=5, effective_batch=10)
    first = list(sampler)
    sampler.epoch = 3
    later = list(sampler)
    assert [epoch for epoch, _ in first] == [0] * 50
    assert [epoch for epoch, _ in later] == [3] * 50
    assert sorted(row for _, row in later) == list(range(50))
    assert [row for _, row in first] != [row for _, row in later]
    assert list(EpochSampler(NONE_PACKED, seed=1, batch=5, effective_batch=10)) == first


@pytest.mark.parametrize(("size", "batch", "length"), [(50, 16, 64), (48, 16, 48), (3, 16, 16)])
def test_the_last_step_is_filled_up(size, batch, length):
    rows = [row for _, row in EpochSampler(np.zeros(size, bool), 1, 1, batch)]
    assert len(rows) == len(EpochSampler(np.zeros(size, bool), 1, 1, batch)) == length
    times = np.bincount(rows, minlength=size)
    assert times.min() >= 1 and times.max() - times.min() <= 1


def test_packed_windows_share_batches():
    packed = np.arange(50) % 3 == 0
    rows = np.array([row for _, row in EpochSampler(packed, 1, batch=4, effective_batch=8)])
    mixed = sum(len(set(packed[batch])) > 1 for batch in rows.reshape(-1, 4))
    assert mixed <= 2 and set(rows) == set(range(50))


@pytest.mark.parametrize("size", [50, 51])
def test_half_of_a_mixed_batch_is_masked(size):
    packed = np.arange(size) % 3 == 0
    sampler = EpochSampler(packed, 1, batch=4, effective_batch=8, by_turns=True)
    for epoch in (0, 1):
        sampler.epoch = epoch
        order = np.array(list(sampler)).reshape(-1, 4, 2)
        masked = np.vectorize(masked_this_epoch)(order[..., 1], order[..., 0]).sum(1)
        assert set(order[..., 1].flat) == set(range(size))
        uneven = np.flatnonzero(masked != 2)
        assert len(uneven) <= size % 2 and abs(masked - 2).max() <= 1


@pytest.mark.parametrize(("rank", "said"), [({}, "torchrun"), ({"RANK": "0"}, "finished")])
def test_the_training_stage_says_why_it_does_not_start(tmp_path, rank, said):
    (tmp_path / "adapter_model.safetensors").touch()
    command = [sys.executable, "-m", "wuxia_core.train", str(tmp_path)]
    finished = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True)
    assert (finished.returncode, said in finished.stderr) == (2, True)
    assert "Traceback" not in finished.stderr


def test_a_gradient_that_is_not_a_number_stops_the_run():
    layer = torch.nn.Linear(2, 2)
    layer(torch.tensor([[1.0, float("nan")]])).sum().backward()
    state = SimpleNamespace(global_step=6)
    with pytest.raises(NonFiniteError, match="step 7"):
        StopOnNonFinite().on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, layer)


def train(config, folder, processes, accumulation):
    """Run the training stage alone, as torchrun does."""
    config = config.model_copy(deep=True)
    config.training.gradient_accumulation_steps = accumulation
    run.write_setup(config, mix(config), folder)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", "-m", "wuxia_core.train", str(folder)),
    ]
    finished = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def short(config):
    """Five steps with an epoch's end among them, each logged; windows of unequal lengths."""
    config.data.data_dir = "data/sample"
    config.data.weights = {"三勺盐.txt": 0.4, "豆花水.txt": 0.4}
    config.training.learning_rate = 5e-5
    config.training.logging_steps = 1
    config.training.max_steps = 5
    config.training.eval_steps = 5
    config.training.warmup_steps = 0
    config.evaluation.max_documents = 2
    mix(config)
    return config


@pytest.mark.slow
def test_two_processes_train_what_one_does_on_the_same_batches(short, tmp_path):
    one = train(short, tmp_path / "one", processes=1, accumulation=2)
    two = train(short, tmp_path / "two", processes=2, accumulation=1)
    assert one.keys() == two.keys()
    for name, weights in one.items():
        assert torch.allclose(weights, two[name], atol=1e-5, rtol=0), name
    seen = [
        json.loads((tmp_path / name / "checkpoint-5" / "trainer_state.json").read_text())
        for name in ("one", "two")
    ]
    assert seen[0]["num_input_tokens_seen"] == seen[1]["num_input_tokens_seen"] > 5 * 64
    steps = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    ]
    # the optimizer would hide a gradient of the wrong size, so the figures are compared too
    for name in ("loss", "grad_norm", "eval_wuxia_loss", "eval_general_loss"):
        of_one, of_two = ([row[name] for row in rows if name in row] for rows in steps)
        assert len(of_one) >= 2
        assert of_one == pytest.approx(of_two, rel=1e-4)


@pytest.mark.slow
def test_a_quantized_base_is_trained_in_two_processes(short, tmp_path):
    pytest.importorskip("bitsandbytes")
    short.model.quantization = "4bit"
    short.data.max_length = 64
    short.training.per_device_train_batch_size = 2
    short.training.max_steps = 2
    weights = train(short, tmp_path / "run", processes=2, accumulation=1)
    assert all(w.isfinite().all() for w in weights.values())
    assert all(w.any() for name, w in weights.items() if "lora_B" in name)


def test_out_of_gpu_memory_ends_with_5_and_what_to_change(tmp_path):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nGPU 0 …")
    known = stage.as_user_error(error, tmp_path)
    assert known.exit_status == 5
    assert "(CUDA out of memory. Tried to allocate 7 GiB.)" in str(known)
    assert "training.gradient_checkpointing=true" in str(known)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            dist.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error\n"
                "ncclSystemError: System call (e.g. socket, malloc) failed.\nLast error:\n"
                "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), "
                "error: No space left on device (28)"
            ),
            MachineError,
            "(size 9637888), error: No space left on device (28)); docker run --shm-size=1g",
        ),
        (
            dist.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\n"
                "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
                "Cuda failure 999 'unknown error'"
            ),
            DeviceLost,
            "Cuda failure 999 'unknown error'",
        ),
        (
            torch.AcceleratorError(
                "CUDA error: an illegal memory access was encountered\nSearch for it", 700
            ),
            DeviceLost,
            "CUDA error: an illegal memory access was encountered",
        ),
        (
            dist.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited\n"
                "ncclRemoteError: A call failed possibly due to a remote process exiting."
            ),
            RankLost,
            "another process is gone",
        ),
    ],
)
def test_failures_of_cards_keep_their_name(tmp_path, error, kind, said):
    known = stage.as_user_error(error, tmp_path)
    assert type(known) is kind and said in str(known)


@pytest.mark.parametrize(
    ("windows", "max_steps", "steps"), [(31 * 64, -1, 10), (10**6, -1, 500), (99, 25, 3), (1, 1, 1)]
)
def test_a_run_saves_about_ten_times_where_nothing_else_is_set(config, windows, max_steps, steps):
    config.training.max_steps, config.training.num_train_epochs = max_steps, 3.0
    config.training.gradient_accumulation_steps, config.training.save_steps = 8, None
    config.training.per_device_train_batch_size = 4
    assert save_steps(config, windows, processes=2) == steps


def measured(folder, patience=None, state=None, **at):
    """Tell of measurements by step, 10 apart, as `Trainer` does.

    Returns its state, the steps that were kept and those after which the run is to stop.
    """
    kept = KeepBest(folder, patience)
    state = state or TrainerState(is_world_process_zero=False)
    state.eval_steps = 10
    kept.on_train_begin(None, state, None)
    best, stops = [], []
    for name, bits in at.items():
        state.global_step, metrics = int(name[2:]), {BEST_METRIC: bits}
        control = SimpleNamespace(should_training_stop=False)
        kept.on_evaluate(None, state, control, None, metrics)
        best += [state.global_step] * (state.global_step == state.best_global_step)
        stops += [state.global_step] * control.should_training_stop
    return state, best, stops


def test_the_best_adapter_is_that_of_fewest_bits_and_the_untrained_one_is_none(tmp_path):
    _, best, stops = measured(tmp_path, at0=1.0, at10=6.2, at20=6.0, at30=6.0, at40=6.1)
    assert (best, stops) == ([10, 20], [])


def test_a_run_stops_after_measurements_without_an_improvement(tmp_path):
    _, _, stops = measured(tmp_path, 2, at10=6.2, at20=6.3, at30=6.1, at40=6.1, at50=6.4)
    assert stops == [50]


def test_a_resumed_run_remembers_what_was_measured_before_its_checkpoint(tmp_path):
    state, _, _ = measured(tmp_path, 2, at0=1.0, at10=6.0, at20=6.1)
    keep(tmp_path, 10)
    assert measured(tmp_path, 2, state, at30=6.2)[1:] == ([], [30])


def test_passages_are_written_by_the_first_process_and_draw_nothing_of_the_training(
    tmp_path, tokenizer
):
    model = add_adapter(load_base("data/tiny_base", "float32"), ModelConfig(), 8000).eval()
    passages = stage.Passages(tmp_path, tokenizer, ["剑光一闪", "雨夜"])
    numbers = torch.get_rng_state()
    for first in (False, True):
        state, args = TrainerState(is_world_process_zero=first), SimpleNamespace(seed=7)
        passages.on_evaluate(args, state, None, model, {BEST_METRIC: 6.9})
    assert torch.equal(torch.get_rng_state(), numbers)
    (row,) = read_rows(tmp_path)
    assert [passage["prompt"] for passage in row["passages"]] == ["剑光一闪", "雨夜"]
    assert all(passage["text"] for passage in row["passages"])


def keep(folder, step):
    (folder / f"best-{step}").mkdir()
    (folder / f"best-{step}" / "adapter_model.safetensors").touch()


def test_an_adapter_kept_after_the_step_that_is_resumed_from_is_judged_anew(tmp_path):
    """With --allow-changed what comes may be worse than it was then."""
    state, _, _ = measured(tmp_path, at10=6.1)
    keep(tmp_path, 20)
    assert measured(tmp_path, None, state, at20=6.4)[1] == [20]


def test_a_second_signal_changes_nothing():
    """The first one leads to a checkpoint at the end of the step, saving or not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopOnSignal()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        args, control = SimpleNamespace(device="cpu"), SimpleNamespace()
        stop.on_step_end(args, SimpleNamespace(global_step=3, max_steps=9), control)
        assert control.should_save and control.should_training_stop and stop.stopped_at == 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_log_that_cannot_be_written_ends_with_5_and_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        append(tmp_path, {"step": 1})
    known = stage.as_user_error(raised.value, tmp_path)
    assert known.exit_status == 5
    assert str(tmp_path) in str(known) and "is the disk full?" in str(known)


@pytest.mark.slow
def test_early_stopping_keeps_the_adapter_that_was_best(short, tmp_path):
    """At a rate that makes it worse and worse, the first is the best."""
    short.training.learning_rate = 0.1
    short.data.weights, short.data.max_length = {}, 512
    short.training.max_steps = 9
    short.training.eval_steps = 2
    short.training.save_steps = 100
    short.training.early_stopping_patience = 1
    short.training.per_device_train_batch_size = 2
    train(short, tmp_path / "run", processes=1, accumulation=1)
    rows = read_rows(tmp_path / "run")
    bits = {r["step"]: r[BEST_METRIC] for r in rows if r["step"] and BEST_METRIC in r}
    assert len(bits) < 5 and list(bits)[-2] == min(bits, key=bits.get)
    assert not list((tmp_path / "run").glob("best*"))


@pytest.mark.slow
def test_a_bug_shows_its_traceback_also_where_torch_holds_back_what_is_printed():
    said = """import io, sys; from pathlib import Path; from wuxia_core.train import exit_with
sys.stderr = io.StringIO(); exit_with(KeyError("bug"), Path("."))"""
    finished = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True)
    assert finished.returncode == 1 and "KeyError: 'bug'" in finished.stderr


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_resident_memory_is_in_bytes_on_a_mac_too(monkeypatch, system, unit):
    if torch.cuda.is_available():
        pytest.skip("a card's memory is asked for")
    monkeypatch.setattr(sys, "platform", system)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert most <= peak_memory() < 2 * most
