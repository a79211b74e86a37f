import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wuxia_core import run
from wuxia_core.config import PROJECT
from wuxia_core.errors import MachineError


def make_checkpoint(folder, step, **files):
    staged = folder / f"{run.STAGING}{step}" / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    for name, content in {"adapter": b"a" * 100, "optimizer": b"o" * 200, **files}.items():
        (staged / name).write_bytes(content)
    run.write_manifest(staged, {"step": step, "world_size": 2})
    run.publish(staged, folder)
    return folder / f"checkpoint-{step}"


def test_a_checkpoint_with_its_manifest_is_whole_and_says_what_it_is_of(tmp_path):
    made = make_checkpoint(tmp_path, 4)
    assert run.find_damage(made) is None
    assert run.newest_checkpoint(tmp_path) == made
    manifest = json.loads((made / "MANIFEST.json").read_text())
    assert manifest["step"] == 4 and manifest["files"]["adapter"]["bytes"] == 100
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda c: (c / "adapter").write_bytes(b"a" * 60), "adapter has changed (100 bytes"),
        (lambda c: (c / "adapter").write_bytes(bytes(100)), "adapter has changed"),
        (lambda c: flip(c / "optimizer"), "optimizer has changed"),
        (lambda c: (c / "optimizer").unlink(), "optimizer cannot be read (No such file"),
        (lambda c: (c / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda c: (c / "MANIFEST.json").write_text('{"files"'), "MANIFEST.json is missing"),
        (lambda c: flip(c / "MANIFEST.json"), "MANIFEST.json is missing or damaged"),
        (lambda c: [path.unlink() for path in c.iterdir()], "MANIFEST.json is missing"),
    ],
    ids=[
        "truncated",
        "zeroed",
        "bit flipped",
        "deleted",
        "no manifest",
        "half manifest",
        "manifest flipped",
        "empty",
    ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, caplog, harm, said):
    before, newest = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-abc").mkdir()
    harm(newest)
    assert run.newest_checkpoint(tmp_path) == before
    assert said in caplog.text and "set aside as checkpoint-10.broken" in caplog.text
    assert (tmp_path / "checkpoint-10.broken").is_dir() and not newest.exists()


def test_what_was_set_aside_before_stays(tmp_path):
    for _ in range(2):
        flip(make_checkpoint(tmp_path, 3) / "adapter")
        assert run.newest_checkpoint(tmp_path) is None
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-3.broken", "checkpoint-3.broken-2"}


@pytest.mark.parametrize(("limit", "left"), [(3, [8, 12, 16]), (1, [12, 16])])
def test_pruning_leaves_at_least_two(tmp_path, limit, left):
    for step in (4, 8, 12, 16):
        make_checkpoint(tmp_path, step)
    run.prune(tmp_path, limit)
    assert [int(c.name[11:]) for c in run.checkpoints(tmp_path)] == left


def test_pruning_counts_whole_ones_only(tmp_path):
    for step in (4, 8, 12, 16):
        made = make_checkpoint(tmp_path, step)
    flip(made / "adapter")
    run.prune(tmp_path, 2)
    assert [int(c.name[11:]) for c in run.checkpoints(tmp_path)] == [8, 12, 16]


def test_a_second_run_is_refused_while_the_first_is_at_work(tmp_path):
    said = f"process {os.getpid()} on .* delete .*run.lock"
    with run.locked(tmp_path), pytest.raises(MachineError, match=said):
        run.locked(tmp_path).__enter__()
    with run.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


LAUNCHER = """
import subprocess, sys
from pathlib import Path
from wuxia_core import run

with run.locked(Path(sys.argv[1])):
    worker = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
    worker.wait()
"""
WORKER = """
import os, sys, time
from pathlib import Path
from wuxia_core import run

run.hold_lock(Path(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_worker_that_outlives_its_launcher_keeps_the_lock(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), WORKER]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as launcher:
        worker = int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        with pytest.raises(MachineError, match=f"process {launcher.pid} on"):
            run.locked(tmp_path).__enter__()
        os.kill(worker, signal.SIGKILL)
        launcher.stdout.read()  # ends with the worker
    with run.locked(tmp_path):
        assert json.loads((tmp_path / run.LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [b"", b'{"host": "x", "pi\n\0\0\n', b'{"host": "x", "pid": 1}'])
def test_a_lock_file_that_nobody_holds_is_taken_over(tmp_path, left):
    (tmp_path / run.LOCK).write_bytes(left)
    with run.locked(tmp_path):
        assert json.loads((tmp_path / run.LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_launcher_takes_no_lock(tmp_path):
    run.hold_lock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_launchers_of_one_rendezvous_share_the_lock(tmp_path):
    with run.locked(tmp_path, "host:1"):
        with run.locked(tmp_path, "host:1"):
            pass
        assert (tmp_path / run.LOCK).exists()
        for other in ("host:2", None):
            with pytest.raises(MachineError):
                run.locked(tmp_path, other).__enter__()
    assert not list(tmp_path.iterdir())


def test_the_last_of_two_launchers_removes_the_lock(tmp_path):
    first, second = (run.locked(tmp_path, "host:1") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(MachineError):
        run.locked(tmp_path, "host:2").__enter__()
    second.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rendezvous", [None, "host:1"])
def test_of_many_at_once_one_gets_the_lock(tmp_path, rendezvous):
    """Or all that meet at the same address."""
    (tmp_path / run.LOCK).write_text("left by a run that was killed")
    start, stop, got = threading.Barrier(8), threading.Event(), []

    def launch():
        start.wait()
        try:
            with run.locked(tmp_path, rendezvous):
                got.append(True)
                stop.wait(10)
        except MachineError:
            got.append(False)
        if len(got) == 8:
            stop.set()

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(got) < 8 and not stop.wait(0.01):
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert sum(got) == (8 if rendezvous else 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_run_folder_that_cannot_be_made_is_said(tmp_path, config, monkeypatch, code):
    """Root may write anywhere, so the error is injected."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    config.training.output_dir = str(tmp_path / "run")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MachineError, match=f"output_dir .*cannot be written .{os.strerror(code)}"):
        run.acquire(config, named=True, resume=False).__enter__()


def test_other_versions_than_a_checkpoints_are_said(tmp_path, caplog):
    staged = tmp_path / f"{run.STAGING}4" / "checkpoint-4"
    staged.mkdir(parents=True)
    run.write_manifest(staged, {"versions": run.versions() | {"torch": "2.0"}})
    run.publish(staged, tmp_path)
    assert run.resume_point(tmp_path).name == "checkpoint-4"
    assert "saved with torch 2.0 (now" in caplog.text and "peft" not in caplog.text


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        run.locked(tmp_path / "file").__enter__()
