"""What happens to a run at night, done to `launch_ddp.py` from outside, two gloo processes each.

The measure is a golden run: after going on, the adapter is byte for byte that of a run to which
nothing happened.
"""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file

from wuxia_core import run
from wuxia_core.config import PROJECT
from wuxia_core.errors import MachineError
from wuxia_core.run import read_rows

pytestmark = pytest.mark.faults

STEPS, SAVE = 12, 4
SETTINGS = {
    "training.max_steps": STEPS, "training.save_steps": SAVE, "training.logging_steps": 1,
    "training.eval_steps": 100, "training.warmup_steps": 0, "evaluation.max_documents": 1,
    "evaluation.minutes": 0.01,
    "data.max_length": 128,  # short steps
    "data.weights": "{三勺盐.txt: 0.2, 豆花水.txt: 0.2}",  # so that epochs end among the steps
    "model.lora_dropout": 0.1,  # so that random numbers matter
}  # fmt: skip
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "mixture"


class Launch:
    """A launch in the background."""

    def __init__(self, folder, mixture, *flags, fault="", before=None, **settings):
        wanted = SETTINGS | {"training.output_dir": folder, "data.processed_data_file": mixture}
        wanted |= {name.replace("__", "."): value for name, value in settings.items()}
        sets = [word for key, value in wanted.items() for word in ("--set", f"{key}={value}")]
        self.folder = folder
        self._log = (folder.parent / f"{folder.name}-{time.monotonic_ns()}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "launch_ddp.py"), *sets, *flags],
            cwd=folder.parent, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=before,
            env=os.environ | {
                "OMP_NUM_THREADS": "1", "WUXIA_FAULT": fault, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
                "PYTHONPATH": f"{PROJECT / 'tests/faults'}{os.pathsep}{PROJECT}",
            },
        )  # fmt: skip

    def at(self, step):
        """Wait until a step is logged."""
        return self.until(lambda: (self.folder / "metrics.jsonl").exists() and any(
            row["step"] >= step for row in read_rows(self.folder)))  # fmt: skip

    def rank(self, rank):
        """Find a process of the run by its rank."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        return next(w for w in workers if w.environ().get("RANK") == str(rank))

    def trained(self):
        """Wait for the adapter; evaluation and report are another test's."""
        self.until((self.folder / ADAPTER).exists)
        self.process.send_signal(signal.SIGTERM)
        status, said = self.end()
        assert status == 0 or (status == 75 and "the adapter is done" in said), said

    def end(self):
        """Wait for the end: exit status and last line."""
        status = self.process.wait(timeout=900)
        said = self.said()
        assert "Traceback" not in said, said[-3000:]
        return status, said.strip().splitlines()[-1]

    def said(self):
        self._log.seek(0)
        return self._log.read()

    def until(self, true):
        deadline = time.monotonic() + 900
        while not true():
            assert self.process.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)
        return self


@pytest.fixture(scope="session")
def golden(tmp_path_factory, mixture):
    """Run to the end without a fault, under nohup: its terminal is closed meanwhile."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    nohup = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    launched = Launch(folder, mixture, before=nohup).at(2)
    os.killpg(launched.process.pid, signal.SIGHUP)
    launched.trained()
    return folder


@pytest.fixture
def launch(tmp_path, mixture):
    """Launch in a folder of its own; nothing is left running."""
    launched = []

    def launch(*flags, folder=tmp_path / "run", **settings):
        launched.append(Launch(folder, mixture, *flags, **settings))
        return launched[-1]

    yield launch
    for each in launched:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)


def steps(folder):
    return [run.step_of(path) for path in run.checkpoints(folder)]


def check_goes_on(launch, golden, **settings):
    """Go on, and get what a run gets to which nothing happened."""
    launched = launch("--resume", **settings)
    launched.trained()
    assert same_adapter(launched.folder, golden), launched.said()[-3000:]
    assert "does not exist" not in launched.said()  # transformers' best checkpoint
    assert tokens_seen(launched.folder) == tokens_seen(golden)
    assert not list(launched.folder.glob(f"{run.STAGING}*"))
    assert not (launched.folder / run.LOCK).exists()


def tokens_seen(folder):
    state = run.read_json(run.checkpoints(folder)[-1] / "trainer_state.json")
    return state["num_input_tokens_seen"]


def same_adapter(folder, golden):
    return (folder / ADAPTER).read_bytes() == (golden / ADAPTER).read_bytes()


def test_a_rank_that_is_killed(launch):
    launched = launch().at(6)
    launched.rank(0).kill()
    status, said = launched.end()
    assert status == 75 and "SIGKILL" in said and "checkpoint-4 is whole" in said
    assert "--resume" in said and steps(launched.folder) == [4]  # goes on in the next test


def test_a_killed_rank_is_started_again(launch, golden):
    launched = launch("--max-restarts", "1").at(6)
    launched.rank(1).kill()
    launched.trained()
    assert "starting afresh from" in launched.said()
    assert same_adapter(launched.folder, golden)
    events = [(row["event"], row["step"]) for row in read_rows(launched.folder) if "event" in row]
    assert events == [("started", 0), ("checkpoint", 4), ("resumed", 4), ("checkpoint", 8),
                      ("checkpoint", 12)]  # fmt: skip


def test_a_launcher_that_is_killed(launch, golden):
    """Its processes notice, save and end; until then they keep the folder."""
    launched = launch().at(6)
    workers = [launched.rank(rank) for rank in (0, 1)]
    workers[0].suspend()
    launched.process.kill()
    launched.process.wait()
    with pytest.raises(MachineError, match=f"process {launched.process.pid} on"):
        run.locked(launched.folder).__enter__()
    workers[0].resume()
    assert not psutil.wait_procs(workers, timeout=120)[1]
    assert steps(launched.folder)[-1] in range(6, 9)
    check_goes_on(launch, golden)


def test_killed_while_a_checkpoint_is_written(launch, golden):
    launched = launch(fault="killed while saving")
    status, said = launched.end()
    assert status == 75 and "checkpoint-4 is whole" in said
    assert steps(launched.folder) == [4] and list(launched.folder.glob(f"{run.STAGING}8"))
    check_goes_on(launch, golden)


@pytest.mark.parametrize(
    ("whom", "number"),
    [("launcher", signal.SIGTERM), ("launcher, twice", signal.SIGQUIT),
     ("one rank", signal.SIGTERM), ("all", signal.SIGHUP)],
)  # fmt: skip
def test_a_signal_saves_and_stops(launch, golden, whom, number):
    launched = launch().at(6)
    if whom.startswith("launcher"):
        launched.process.send_signal(number)
        if "twice" in whom:
            time.sleep(0.1)  # torchrun has told its processes by then, and waits for them
            launched.process.send_signal(number)
    elif whom == "one rank":
        launched.rank(1).send_signal(number)
    else:  # as a terminal does
        os.killpg(launched.process.pid, number)
    status, said = launched.end()
    assert status == 75 and said.startswith("stopped")
    check_saved(launched.folder)
    assert "is whole; go on" in said
    if whom == "launcher":
        check_goes_on(launch, golden)


OFTEN = {"training__eval_steps": 8}


@pytest.fixture(scope="session")
def measured_golden(tmp_path_factory, mixture):
    """Run to the end with a measurement on the way."""
    launched = Launch(tmp_path_factory.mktemp("measured") / "run", mixture, **OFTEN)
    launched.trained()
    return launched.folder


@pytest.mark.parametrize(("step", "saved"), [(0, 1), (8, 8), (STEPS, STEPS)])
def test_a_signal_while_held_out_text_is_measured(launch, measured_golden, step, saved):
    """The measurement is cut off, and made when the run goes on."""
    launched = launch(fault=f"signal while measuring {step}", **OFTEN)
    status, said = launched.end()
    assert status == 75 and f"checkpoint-{saved} is whole" in said
    assert steps(launched.folder)[-1] == saved
    check_goes_on(launch, measured_golden, **OFTEN)
    rows = [row for row in read_rows(launched.folder) if "eval_wuxia_loss" in row]
    assert [row["step"] for row in rows if row["step"]] == [8, STEPS]


def check_saved(folder):
    newest = steps(folder)[-1]
    assert newest in range(6, STEPS)  # saved for the signal, at once or nearly
    assert run.find_damage(folder / f"checkpoint-{newest}") is None


def test_ctrl_c_where_what_reads_the_output_dies_first(launch):
    reader, writer = os.pipe()
    launched = launch(before=lambda: [os.dup2(writer, out) for out in (1, 2)])
    os.close(writer)
    launched.at(6)  # what it says so far fits into the pipe of `| tee log`
    os.close(reader)
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.process.wait(timeout=900) == 75
    check_saved(launched.folder)


def test_a_number_that_is_none_on_one_rank(launch):
    launched = launch(fault="not a number")
    status, said = launched.end()
    assert status == 4 and "step 6 is not a finite number" in said
    assert steps(launched.folder) == [4] and not (launched.folder / ADAPTER).exists()
    weights = load_file(launched.folder / "checkpoint-4" / ADAPTER)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_rank_that_does_not_answer(launch):
    launched = launch(training__ddp_timeout=6).at(6)
    waiting, silent = launched.rank(0), launched.rank(1)
    silent.suspend()
    waiting.wait(timeout=300)
    silent.resume()  # or torchrun waits half a minute before it kills it
    status, said = launched.end()
    assert status == 75 and "gone or does not answer" in said and "checkpoint-4 is whole" in said


def test_two_runs_in_one_folder(launch):
    first = launch(training__max_steps=5000).at(1)
    status, said = launch("--resume", training__max_steps=5000).end()
    assert status == 5 and "a run is at work there" in said
    assert first.process.poll() is None


def test_a_full_disk(launch, small_disk):
    """After a measurement, since transformers then lets the ranks wait while it saves."""
    disk = small_disk(2)
    settings = {"folder": disk / "run", "model__lora_r": 1, "training__eval_steps": 7}
    settings |= {"training__ddp_timeout": 60}
    launched = launch(**settings).at(5)
    launched.until((disk / "run" / "best-7").exists)
    (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 20_000))
    status, said = launched.end()
    assert status == 5 and "cannot be written" in said and "free some space" in said
    assert steps(disk / "run")[-1] in (4, 8)  # 8 if it was saved before the disk was full
    assert run.find_damage(disk / "run" / "checkpoint-4") is None
    assert not list((disk / "run").glob(f"{run.STAGING}*"))
    (disk / "filler").unlink()
    launch("--resume", **settings).trained()


def test_a_bit_that_flipped_in_the_newest_checkpoint(launch, golden, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(golden, folder)
    (folder / ADAPTER).unlink()
    damaged = folder / "checkpoint-12" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    check_goes_on(launch, golden)
    assert (folder / "checkpoint-12.broken").is_dir()


def test_two_machines_train_what_one_does(launch, golden):
    """Two launchers on this machine, a process each: the same steps and the same adapter."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
    both = [launch(*flags), launch(*flags)]
    for each in both:
        assert each.end()[0] == 0, each.said()[-3000:]
    assert sorted("scorecard" in each.said() for each in both) == [False, True]  # one of them
    folder = both[0].folder
    assert same_adapter(folder, golden)
    of_one, of_two = ([(row["step"], row["loss"]) for row in read_rows(f) if "loss" in row]
                      for f in (golden, folder))  # fmt: skip
    assert of_one == of_two and len(of_one) == STEPS
