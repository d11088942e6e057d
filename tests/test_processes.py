"""Signals and launched processes, with real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from empathic.processes import Stopped, leave, stop_on_signals, stop_requests

# A program that says that it runs, and what ended it.
WORK = """
import sys, time
from pathlib import Path
from empathic.errors import run_program

def work():
    Path(sys.argv[1], "pid").write_text(str(__import__("os").getpid()))
    try:
        if sys.argv[2:]:
            raise ValueError("the reason of the failure")
        time.sleep(60)
    finally:
        Path(sys.argv[1], "cleaned").touch()

sys.exit(run_program("work", work))
"""


@pytest.fixture
def started(tmp_path):
    (tmp_path / "some_work.py").write_text(WORK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    processes = []

    def start(*command, wait=True):
        process = subprocess.Popen(
            [sys.executable, *command, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.05)
        return process, int((tmp_path / "pid").read_text())

    yield start
    for process in processes:
        process.kill()


def is_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


LAUNCH = "import sys; from empathic.processes import launch; sys.exit(launch('some_work', sys.argv[1:]))"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launching_process_reaches_the_work(started, tmp_path, signum):
    process, pid = started("-c", LAUNCH)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and is_gone(pid, 0.1) and (tmp_path / "cleaned").exists()
    assert "Traceback" not in text and text.count("work: ") == 1


@pytest.mark.parametrize("launcher", [["-c", LAUNCH], ["-m", "accelerate.commands.launch", "-m", "some_work"]])
def test_the_work_ends_with_a_launcher_that_is_killed(started, tmp_path, launcher):
    process, pid = started(*launcher)
    process.send_signal(signal.SIGKILL)
    assert is_gone(pid, 20) and (tmp_path / "cleaned").exists()


def test_the_work_shows_its_own_error_and_the_launcher_adds_nothing(tmp_path):
    (tmp_path / "some_work.py").write_text(WORK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(tmp_path), "fail"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 1 and run.stderr == "work: the reason of the failure\n"


def test_a_signal_ends_a_program_as_an_error_does():
    cleaned = []
    with pytest.raises(Stopped) as stop, stop_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the same signal, passed on by a launcher
            cleaned.append(True)
    assert stop.value.code == 143 and cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_request_waits_for_the_work_and_a_later_one_does_not():
    with pytest.raises(KeyboardInterrupt), stop_requests() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same
        assert request and request.signum == signal.SIGINT
        request.since -= 2
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_user_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # `nohup`
    try:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


LEAVES = """
import atexit, os, sys, threading, time
import torch
from pathlib import Path
from empathic.processes import leave

store = f"file://{sys.argv[1]}/store"
torch.distributed.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
atexit.register(Path(sys.argv[1], f"atexit{sys.argv[2]}").touch)
threading.Thread(target=lambda: (time.sleep(0.3), Path(sys.argv[1], f"thread{sys.argv[2]}").touch())).start()

class Ends:
    def __del__(self):
        print("taken apart")

ends = Ends()
print("said", end="")
leave(int(sys.argv[3]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_of_several_leaves_without_taking_apart_what_threads_still_use(tmp_path, status):
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, str(tmp_path), str(rank), str(status)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status and output == "said"
    assert {path.name for path in tmp_path.glob("*[01]")} == {"atexit0", "atexit1", "thread0", "thread1"}


def test_a_process_alone_ends_as_usual():
    with pytest.raises(SystemExit) as end:
        leave(3)
    assert end.value.code == 3
