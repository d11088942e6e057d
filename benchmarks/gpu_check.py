"""
Check and measure on one GPU all that a CPU cannot show, within ten minutes:

    python -m empathic.benchmarks.gpu_check --output runs/gpu_check

Each part runs in a process of its own and writes `PART.json`; `gpu_check.json` and `gpu_check.md` join them. A part
that is finished is not run again, so a run that was stopped, or whose time was up, continues with the same command.
Nothing is downloaded, except kernels of the Hub where the package `kernels` is installed and there is a network.

`--dry_run` runs every part at a tiny size on the CPU, to find mistakes before a GPU is paid for. It measures nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..files import write_json
from .gpu_parts import PARTS, Settings
from .machine import describe_machine

MINUTES = 10.0
NEEDED = 20.0  # seconds that must be left to start a part


def _summary(part: Callable) -> str:
    """Return the first line of a part's docstring."""
    return (part.__doc__ or "").splitlines()[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="python -m empathic.benchmarks.gpu_check",
        description="Check and measure on one GPU what a CPU cannot show.",
        epilog="parts:\n" + "\n".join(f"  {name:12} {_summary(part)}" for name, part in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="folder to write (%(default)s)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run (default: all)"
    )
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--again", action="store_true", help="run finished parts again")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts together (%(default)g)")
    parser.add_argument("--dry_run", action="store_true", help="run all parts at a tiny size on the CPU")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)  # runs in this process
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    return options


def identity(settings: Settings) -> dict:
    """What a finished part must agree with to be kept."""
    machine = describe_machine(settings.device)
    return {"dry_run": settings.dry_run, "device": machine["device"], "versions": machine["versions"]}


def run_part(name: str, settings: Settings) -> dict:
    """Run a part in this process, and write and return its record."""
    settings.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = PARTS[name](settings)
    record = {
        "part": name,
        "identity": identity(settings),
        "machine": describe_machine(settings.device),
        "seconds": time.perf_counter() - started,
        "problems": result.pop("problems", []),
        "result": result,
    }
    write_json(settings.output / f"{name}.json", record)
    return record


def finished(name: str, settings: Settings) -> dict | None:
    """Return the record of a part that is finished on this machine with these versions, or None."""
    path = settings.output / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("identity") == identity(settings) else None


def run_in_process(name: str, settings: Settings, seconds: float) -> dict:
    """Run a part in a new process, and return its record; with `error` if it failed or took longer."""
    command = [sys.executable, "-m", "empathic.benchmarks.gpu_check", "--one", name, "--output", str(settings.output)]
    command += ["--dry_run"] if settings.dry_run else []
    log = settings.output / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"part": name, "error": f"not finished after {seconds:.0f} s; its output is in {log}"}
    record = finished(name, settings) if done.returncode == 0 else None
    if record is None:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        return {"part": name, "error": f"{lines[-1]} (status {done.returncode}; all of its output is in {log})"}
    return record


def markdown(results: dict) -> str:
    """Format the report."""
    machine = results["machine"]
    memory = f", {machine['gpu_memory_gib']:.0f} GiB" if "gpu_memory_gib" in machine else ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    lines = ["# GPU check", f"{machine['device']}{memory}; {versions}."]
    if results["dry_run"]:
        lines.append("**Dry run at a tiny size on a CPU: no figure here says anything about a GPU.**")
    rows = ["| part | seconds | outcome |", "|---|---:|---|"]
    for name, record in results["parts"].items():
        problems = [record["error"]] if "error" in record else record["problems"]
        shown = "; ".join(problems) or record["result"].get("summary", "done")
        rows.append(f"| {name} | {record.get('seconds', 0):.0f} | {shown.replace('|', '/')} |")
    rows += [f"| {name} | | not run: the time was up |" for name in results["not_run"]]
    return "\n\n".join([*lines, "\n".join(rows)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the parts; return 0 if all ran and found no problem, else 1."""
    options = parse(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no GPU here. Use --dry_run to try all parts at a tiny size on the CPU.", file=sys.stderr)
        return 1
    settings = Settings(output=options.output, dry_run=options.dry_run)
    if options.one is not None:
        run_part(options.one, settings)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results = {
        "dry_run": options.dry_run,
        "machine": describe_machine(settings.device),
        "parts": {},
        "not_run": [],
    }
    for name in options.parts:
        if name in options.skip:
            continue
        record, left = None if options.again else finished(name, settings), end - time.monotonic()
        if record is not None:
            print(f"{name}: finished before", flush=True)
        elif left < NEEDED:
            results["not_run"].append(name)
            print(f"{name}: not run, because only {left:.0f} s are left", flush=True)
            continue
        else:
            print(f"{name}: {_summary(PARTS[name])} ({left:.0f} s left)", flush=True)
            record = run_in_process(name, settings, left)
        results["parts"][name] = record
        write_json(options.output / "gpu_check.json", results)
        (options.output / "gpu_check.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}\nAll results are in {options.output}.")
    failed = [name for name, record in results["parts"].items() if "error" in record or record["problems"]]
    return int(bool(failed or results["not_run"]))


if __name__ == "__main__":
    sys.exit(main())
