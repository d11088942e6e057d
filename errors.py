"""
The error boundary of every program of the package: one or two lines instead of a traceback, and an exit status.

`--traceback` on the command line shows the traceback as well. Tokens and keys are never shown.
"""

import errno
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import requires
from pathlib import Path

from .processes import Stopped, end_with_launcher, is_launched, stop_on_signals

OPTION = "--traceback"
VARIABLE = "EMPATHIC_TRACEBACK"  # passes the option on to the processes that a launcher starts
PACKAGE = str(Path(__file__).parent)

# Errors whose message is meant for the user. Any other class is a fault of the program, and its name is shown.
_EXPECTED = (OSError, ValueError, RuntimeError, ImportError, NotImplementedError, FloatingPointError)
_REMEDIES = {
    errno.ENOSPC: "The disk is full. Free space or choose a folder on another disk, and run the command again.",
    errno.EDQUOT: "Your quota is used up. Free space or choose another folder, and run the command again.",
    errno.EFBIG: "The file is larger than the limit of the system or the process (`ulimit -f`). Raise it.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.EACCES: "Choose a path that you may read and write, or change its permissions.",
    errno.EPERM: "Choose a path that you may read and write, or change its permissions.",
    errno.ENOTDIR: "A part of this path is a file. Choose another path.",
    errno.EEXIST: "Choose a folder; a file of this name exists.",
    errno.EISDIR: "This is a folder. Give the path of a file.",
    errno.ENOENT: "Check the path.",
    errno.EMFILE: "Too many files are open. Raise the limit with `ulimit -n`.",
}
_TOKEN = re.compile(r"\b(hf_|sk-|api_)[A-Za-z0-9_-]{8,}")


def run_program(name: str, work: Callable[[], int | None], argv: list[str] | None = None) -> int:
    """
    Run a program, and return its exit status: that of `work` (None counts as 0), 1 after an error, 130 after Ctrl-C,
    128 + the number of the signal after SIGTERM or SIGHUP.

    Args:
        name: the name that errors begin with, such as `empathic train`.
        work: the program.
        argv: the arguments, for finding tokens that a message must not show; by default those of the process, from
            which `--traceback` is then removed.
    """
    if argv is None:
        argv = sys.argv[1:]
        take_option(sys.argv)
    _replace_what_a_stream_cannot_show()
    if is_launched():
        end_with_launcher()
    try:
        with stop_on_signals():
            status = work() or 0
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        _say(f"{name}: interrupted.")
        return 130
    except Stopped as stop:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            _say(f"{name}: {stop}")
        return stop.code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return 141  # the reader of our output is gone, as in `| head`
        shown = traceback.format_exception(error) if os.environ.get(VARIABLE) else [describe(error)]
        # The processes of a launch mostly fail for one reason. The first shows it, and the launcher ends the others.
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            time.sleep(3)
        _say(without_secrets(f"{name}: {''.join(shown).rstrip()}", argv))
        return 1


@contextmanager
def loading(name: str, option: str = "") -> Iterator[None]:
    """
    Within, load a model from a folder or the Hub. An error then names it, and the option that gave it.

    Raises:
        FileNotFoundError: if there is no such folder and no such model on the Hub, or the folder has no config.json.
    """
    given = f"{option} {name}".strip()
    configs = [os.path.join(name, file) for file in ("config.json", "adapter_config.json")]
    if os.path.isfile(name) or (os.path.isdir(name) and not any(map(os.path.isfile, configs))):
        raise FileNotFoundError(f"{given} is no folder of a model: it has no config.json. Give the model's folder.")
    try:
        yield
    except (OSError, ValueError) as error:
        if os.path.isdir(name) or _is_raised_here(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{given}: there is no such folder, and no such model could be loaded from the Hub. Check it.\n{reason}"
        ) from error


def take_option(argv: list[str]) -> None:
    """Remove `--traceback` from a command line, and keep the choice for this process and those that it starts."""
    if OPTION in argv:
        argv.remove(OPTION)
        os.environ[VARIABLE] = "1"


def describe(error: BaseException) -> str:
    """Describe an error in one or two lines: the value, the rule, and the remedy as far as they are known."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno is not None and type(error).__module__ == "builtins":
        return _describe_os_error(error)
    if not text:
        text = type(error).__name__
    if not _is_raised_here(error):
        text = "\n".join([line.strip() for line in text.splitlines() if line.strip()][:2])
    foreign = type(error).__module__.split(".")[0] not in ("builtins", "empathic")
    if not isinstance(error, _EXPECTED) and (not foreign or isinstance(error, LookupError)):
        text = f"{type(error).__name__}: {text}. This is a fault of the program; {OPTION} shows where it is."
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_with(error.name or "")):
        text = f"{text}\nThis command needs further packages: pip install 'empathic[{extra}]'"
    # safetensors and torch raise their own class for an error of the system.
    if _is_caused_by(error, errno.ENOSPC) or "(os error 28)" in text or "file write failed" in text:
        text = f"{text}\n{_REMEDIES[errno.ENOSPC]}"
    elif "out of memory" in text.lower():
        text = f"{text}\nUse smaller batches, or a device with more memory."
    return text


def _describe_os_error(error: OSError) -> str:
    reason = (error.strerror or str(error)).strip().rstrip(".")
    remedy = _REMEDIES.get(error.errno, "")
    path = next((os.fsdecode(path) for path in (error.filename2, error.filename) if isinstance(path, (str, bytes))), "")
    cache = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache, full = os.path.abspath(cache) + os.sep, os.path.abspath(path) + os.sep
    if path and (full.startswith(cache) or cache.startswith(full)) and error.errno != errno.ENOENT:
        remedy = "The cache of Hugging Face is there: set HF_HOME to a folder that can be written."
    return f"{path}: {reason}. {remedy}".strip() if path else f"{reason}. {remedy}".strip()


def _extra_with(module: str) -> str | None:
    """The first extra of the package, in the order of setup.cfg, that installs a module; None if there is none."""
    with suppress(ModuleNotFoundError):  # also PackageNotFoundError, where the package is not installed
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        wanted = canonicalize_name(module.partition(".")[0])
        for line in map(Requirement, requires("empathic") or []):
            extra = re.search(r'extra == "(\w+)"', str(line.marker))
            if extra and extra[1] != "dev" and canonicalize_name(line.name) == wanted:
                return extra[1]
    return None


def _is_caused_by(error: BaseException | None, number: int) -> bool:
    """Whether a system error with this number is in the chain of causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == number:
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_raised_here(error: BaseException) -> bool:
    """Whether a line of this package raised the error, so that its message is complete and ours."""
    frames = traceback.extract_tb(error.__traceback__)
    file = frames[-1].filename if frames else ""
    return file.startswith(PACKAGE + os.sep) and "site-packages" not in file.removeprefix(PACKAGE)


def without_secrets(text: str, argv: list[str] = ()) -> str:
    """Return the text with every token replaced by `***`: those that look like one, and those given as an option."""
    for place, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option.startswith("--") and option.endswith(("token", "key", "password", "secret")):
            value = value if equals else (argv[place + 1 : place + 2] or [""])[0]
            if len(value) > 3 and not value.startswith("--"):
                text = text.replace(value, "***")
    return _TOKEN.sub(r"\1***", text)


def _replace_what_a_stream_cannot_show() -> None:
    """Let no character of a text end the program: in a locale that is not UTF-8, it is replaced."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _output_is_closed() -> bool:
    """Whether nobody reads stdout any more. If so, what is left for it is dropped."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not any(event & select.POLLERR for _, event in output.poll(0)):
            return False
    except (AttributeError, OSError, ValueError):  # no pipe, or another system
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
    return True


def _say(text: str) -> None:
    with suppress(OSError):  # there may be nowhere to say it
        print(text, file=sys.stderr, flush=True)
