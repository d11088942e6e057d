"""
Signals and child processes: a signal to a program reaches the process that does the work, which saves or stops.

`stop_on_signals` is for every program, `stop_requests` for the part of a program that ends at a point of its own
choice, `launch` for a program that works in the processes of `accelerate launch`, and `leave` ends such a process.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from .files import packaged

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# A launcher passes on a signal that a terminal also sends to each process. Within this time both count as one.
SAME_SIGNAL_SECONDS = 1.0
_LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # set by every kind of `accelerate launch`


class Stopped(SystemExit):
    """The program was stopped by a signal. `code` is the exit status, 128 + the number of the signal."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(128 + signum)
        self.signum, self.text = signum, text

    def __str__(self) -> str:
        return self.text or f"stopped by {signal.Signals(self.signum).name}."


class StopRequest:
    """Whether a signal has asked the work to stop."""

    def __init__(self):
        self.signum: int | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None


def _is_ours(handler) -> bool:
    """Whether a handler may be replaced. `nohup` ignores SIGHUP, and a shell ignores Ctrl-C for a background job."""
    return handler not in (signal.SIG_IGN, None)


@contextmanager
def _handled(handler, signals) -> Iterator[None]:
    """Within, `handler` handles the signals that are not ignored. Only the main thread can set handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in signals}
        before = {signum: old for signum, old in before.items() if _is_ours(old)}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """
    Within, SIGTERM and SIGHUP raise `Stopped`, so that files are closed and folders are released as after an error.

    A signal that follows at once is ignored: it would interrupt this.
    """
    last = 0.0

    def stop(signum, frame):
        nonlocal last
        before, last = last, time.monotonic()
        if last - before < SAME_SIGNAL_SECONDS:
            return
        raise KeyboardInterrupt if signum == signal.SIGINT else Stopped(signum)

    signals = SIGNALS
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signals = (*SIGNALS, signal.SIGINT)
    with _handled(stop, signals):
        yield


@contextmanager
def stop_requests(text: str = "") -> Iterator[StopRequest]:
    """
    Within, the first SIGTERM, SIGHUP or Ctrl-C is only noted in the `StopRequest`, so that the work can save first; a
    second one that comes later stops at once.

    Args:
        text: shown at the first signal.
    """
    request = StopRequest()

    def note(signum, frame):
        now = time.monotonic()
        if not request:
            request.signum, request.since = signum, now
            if text and int(os.environ.get("LOCAL_RANK", "0")) == 0:
                os.write(2, f"\n{text}\n".encode())  # `print` is not safe in a handler
        elif now - request.since > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt if signum == signal.SIGINT else Stopped(signum)

    with _handled(note, (*SIGNALS, signal.SIGINT)):
        yield request


def outlive_signals(seconds: int = 60) -> None:
    """
    Let a worker process go on for some time after SIGTERM, and ignore Ctrl-C: a launcher or a scheduler also sends the
    signal to the workers of the process that is still saving, and ends without its workers.
    """

    def end_later(signum, frame):
        signal.alarm(seconds)

    signal.signal(signal.SIGTERM, end_later)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------- launching


def is_launched() -> bool:
    """Whether `accelerate launch` has started this process."""
    return _LAUNCHED in os.environ


def end_with_launcher() -> None:
    """
    Send this process SIGTERM when the process that started it is gone: a launcher that is killed cannot tell its
    processes, and they would go on without a parent.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def leave(status: int) -> NoReturn:
    """
    End the process with an exit status, as `sys.exit` does.

    One of several processes of a run leaves its process group, and then skips the end of the interpreter: threads of
    the group outlive it where DDP was used, and one that frees a tensor meanwhile aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        sys.exit(status)
    import torch.distributed

    if status == 0 and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    threading._shutdown()  # these two are what the interpreter itself does first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it may be closed
            stream.flush()
    os._exit(status)


def launch(module: str, arguments: list[str], config: str | None = None, cpu_processes: int | None = None) -> int:
    """
    Run a module in the processes of `accelerate launch`; return their exit status, as a shell shows it.

    The launcher runs in this process, so that a signal can be passed on to the processes and their exit status is kept.
    The processes show their own errors.

    Args:
        module: the module to run, as after `python -m`.
        arguments: its command line.
        config: a configuration file of `accelerate`, of the user or among `accelerate_configs/` of this package.
        cpu_processes: the number of processes on the CPU, without a configuration file. The module must know that it is
            to use the CPU.
    """
    from subprocess import CalledProcessError

    import psutil
    import torch.distributed.run  # noqa: F401 (creates the loggers below)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    how = [] if config is None else ["--config_file", packaged(config)]
    if cpu_processes is not None:  # `--cpu` would start one process
        how += ["--multi_gpu", "--num_processes", str(cpu_processes), "--num_machines", "1"]
        how += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = launch_command_parser().parse_args([*how, "-m", module, *arguments])
    # What they log only lists the defaults, or repeats what the processes show.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("accelerate.commands.launch", "torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def pass_on(signum, frame):
        children = psutil.Process().children()
        for child in children:
            child.send_signal(signum)
        if not children:
            raise KeyboardInterrupt if signum == signal.SIGINT else Stopped(signum)

    try:
        with _handled(pass_on, (*SIGNALS, signal.SIGINT)):
            launch_command(options)
        return 0
    except CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as error:  # torch's launcher has stopped the processes
        status = 128 + int(error.sigval)
    if status < 0:
        name = signal.Signals(-status).name
        why = " Often the memory of the machine is exhausted." if name == "SIGKILL" else ""
        print(f"The process of {module} was ended by {name}.{why}", file=sys.stderr)
    return status if status >= 0 else 128 - status
