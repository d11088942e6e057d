"""The parts of the GPU check. Each takes the settings and returns a JSON value with a `summary`, and with `problems`
where a result is outside of its tolerance."""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from transformers import Mamba2Config, MambaConfig

from ..kernels_empathic import CONVOLUTION, EXACT, SCAN, SSD, kernel_source, without_kernels
from ..memory_empathic import MambaCompressor
from ..trainers.packing import varlen_attention
from ..trainers.packing.shared_prefix import PairLayout
from . import efficiency, preference, rehearsal
from .efficiency_arms import make_conversation, preset_parts
from .efficiency_options import UTTERANCE
from .efficiency_turns import measure_turns
from .preference_sides import OURS

TESTS = Path(__file__).parents[1] / "tests"
MEM = 1000  # id of <MEM>
# Largest root mean square of a difference, relative to that of the exact result, by dtype: of the memory vectors, of
# the gradients, and of vectors that come from a stream. In bfloat16 the exact code itself rounds by about 1 %.
TOLERANCES = {
    "float32": {"vectors": 1e-4, "gradients": 1e-3, "streamed": 1e-4},
    "bfloat16": {"vectors": 3e-2, "gradients": 6e-2, "streamed": 3e-2},
}
VARLEN_TOLERANCE = varlen_attention.TOLERANCE


@dataclass(frozen=True)
class Settings:
    """Where to write, and whether at a tiny size on the CPU."""

    output: Path
    dry_run: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def preset(self) -> str:
        return "tiny" if self.dry_run else "qwen2.5-7b"


def seconds_of(run: Callable, device: str, repeats: int) -> float:
    """Median seconds of a call, after one that is not timed."""
    taken = []
    for turn in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if turn:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square of the difference, relative to that of the wanted tensor."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-12))


# ----------------------------------------------------------------------------------------------------------- the parts


def gpu_tests(settings: Settings) -> dict:
    """The tests marked `gpu` (skipped where the repository's tests are not there)."""
    if not TESTS.is_dir():
        return {"summary": "no tests here: this is an installed package"}
    report = settings.output / "gpu_tests.xml"
    command = [sys.executable, "-m", "pytest", str(TESTS / "test_gpu.py"), "-m", "gpu", f"--junitxml={report}"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=TESTS.parent)
    if not report.is_file():
        tail = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return {"problems": [f"pytest did not run: {' '.join(tail)}"]}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return {"problems": [f"{report} has no test suite"]}
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") or case.find("error")]
    failed = failed or ["some"] * bool(counts["failures"] + counts["errors"])
    return {
        "summary": f"{counts['tests']} tests, {counts['skipped']} skipped",
        "counts": counts,
        "problems": [f"{name} failed" for name in failed],
    }


def _encoder(kind: str, settings: Settings) -> MambaCompressor:
    """An encoder with the width of Mamba-370M and few layers, with time steps that let the past matter."""
    width, layers = (32, 2) if settings.dry_run else (1024, 4)
    if kind == "mamba":
        config = MambaConfig(vocab_size=MEM, hidden_size=width, num_hidden_layers=layers, state_size=16)
    else:
        heads: dict[str, Any] = {"num_heads": 2 * width // 64 or 1, "head_dim": 64 if width > 32 else 2 * width}
        config = Mamba2Config(vocab_size=MEM, hidden_size=width, num_hidden_layers=layers, n_groups=1, **heads)
    torch.manual_seed(0)
    model = MambaCompressor(config, width, MEM, projector_scale=1.0)
    with torch.no_grad():
        for name, parameter in model.mamba.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.uniform_(-4, 0)
    return model.to(settings.device)


def _compare_encoder(kind: str, dtype: str, length: int, settings: Settings) -> dict:
    """Compare an encoder with kernels to the exact code: vectors, gradients, a stream in pieces, and times."""
    model = _encoder(kind, settings).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, MEM, (2, length), generator=generator)
    ids[:, 15::16] = MEM
    ids = ids.to(settings.device)
    mask = torch.ones_like(ids)
    mask[1, length * 2 // 3 :] = 0

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        vectors = model(ids, mask)
        vectors.float().square().cumsum(-1).mean().backward()
        gradients = [p.grad.flatten() for name, p in model.named_parameters() if "embeddings" not in name]
        return vectors.detach(), torch.cat(gradients).float()

    def stream() -> torch.Tensor:
        state, found = model.new_state(1), []
        for first in range(0, length, 40):
            found.append(model.append(state, ids[:1, first : first + 40]))
        return torch.cat(found)

    with without_kernels():
        (wanted, wanted_gradients), wanted_stream = step(), stream()
        exact = seconds_of(step, settings.device, 1)
    vectors, gradients = step()
    return {
        "encoder": kind,
        "dtype": dtype,
        "length": length,
        "vectors": _far(vectors, wanted),
        "gradients": _far(gradients, wanted_gradients),
        "streamed": _far(stream(), wanted_stream),
        "seconds_exact": exact,
        "seconds": seconds_of(step, settings.device, 3),
    }


def kernels(settings: Settings) -> dict:
    """Mamba's kernels against the exact code, fp32 and bf16, forward, backward and streaming."""
    device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
    sources = {name: kernel_source(name, device) for name in (SCAN, SSD, CONVOLUTION)}
    lengths = (48,) if settings.dry_run else (128, 512)
    rows, problems = [], []
    for kind in ("mamba", "mamba2"):
        for dtype in ("float32", "bfloat16"):
            for length in lengths:
                row = _compare_encoder(kind, dtype, length, settings)
                rows.append(row)
                for name, largest in TOLERANCES[dtype].items():
                    if not row[name] <= largest:
                        where = f"{kind}, {dtype}, length {length}"
                        problems.append(f"{where}: {name} differ by {row[name]:.2g}, allowed {largest:g}")
    fastest = max(row["seconds_exact"] / row["seconds"] for row in rows)
    used = ", ".join(dict.fromkeys(source for source in sources.values() if source != EXACT))
    summary = (
        f"by {used}; up to {fastest:.1f} times as fast as the exact code" if used else "no kernels: the exact code"
    )
    return {"summary": summary, "sources": sources, "tolerances": TOLERANCES, "rows": rows, "problems": problems}


def varlen(settings: Settings) -> dict:
    """Variable-length attention of packed pairs against attention pair by pair."""
    heads, width, pairs = (4, 16, 2) if settings.dry_run else (28, 128, 8)
    prompt, reply = (12, 5) if settings.dry_run else (384, 48)
    size = prompt + 2 * reply
    spans = [(size * place, prompt, size * place + prompt + reply, size * (place + 1)) for place in range(pairs)]
    dtype = torch.float32 if settings.dry_run else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 1, heads, size * pairs, width, generator=generator).to(settings.device, dtype)
    query, key, value = (part.clone().requires_grad_() for part in states)

    def both(attend: Callable) -> list[torch.Tensor]:
        output = attend(query, key, value, 0.0, None)
        return [output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))]

    layout = PairLayout(spans)
    kernel = varlen_attention.kernel_for(query)
    wanted, found = both(layout.plain), both(layout.attend)
    pairs_of_results = ((a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True))
    differences = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs_of_results]
    used = kernel is not None and varlen_attention._is_right is not False
    names = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
    problems = [
        f"{name} differs by {far:.2g} of its largest value, allowed {VARLEN_TOLERANCE:g}"
        for name, far in zip(names, differences, strict=True)
        if not far <= VARLEN_TOLERANCE
    ]
    if kernel is not None and not used:
        problems.append("torch's variable-length attention did not agree with plain attention, or did not run")
    plain, packed = (seconds_of(lambda way=way: both(way), settings.device, 5) for way in (layout.plain, layout.attend))
    summary = (
        f"{plain / packed:.1f} times as fast as pair by pair" if used else "no kernel here: plain attention is used"
    )
    result = {"summary": summary, "used": used, "differences": dict(zip(names, differences, strict=True))}
    return {**result, "seconds_plain": plain, "seconds": packed, "tolerance": VARLEN_TOLERANCE, "problems": problems}


def full_size(settings: Settings) -> dict:
    """Rehearsal: steps of memory_multi, dialogue and epo at full size (memory, tokens/s, MFU)."""
    steps = "1" if settings.dry_run else "3"
    small = ["--batch_size", "1", "--turns", "3", "--dtype", "float32"] if settings.dry_run else []
    found = rehearsal.main(["--preset", settings.preset, "--steps", steps, "--device", settings.device, *small])
    parts, problems = [], []
    for stage, row in found["measured"].items():
        if "out_of_memory" in row:
            problems.append(f"{stage}: {row['out_of_memory']}")
            continue
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.0%}"
        parts.append(f"{stage} {row['peak_memory_gib']:.1f} GiB, {row['tokens_per_second']:.0f} tokens/s{mfu}")
    return {"summary": "; ".join(parts), **found, "problems": problems}


def table_3(settings: Settings) -> dict:
    """Efficiency in the paper's setting at full size (Table 3)."""
    size = ["--dialogues", "1", "--repeats", "1"] if settings.dry_run else ["--dialogues", "4", "--repeats", "3"]
    folder = settings.output / "efficiency"
    line = ["--preset", settings.preset, "--paper", "--device", settings.device, "--output", str(folder), *size]
    found = efficiency.main(line)
    means = found["paper"]["means"]
    changes = ", ".join(
        f"{name} {means['compressed'][key] / means['text'][key] - 1:+.0%}"
        for name, key in (("positions", "positions"), ("memory", "peak_bytes"), ("time", "seconds"))
    )
    return {"summary": f"compressed against text: {changes}", **found}


def turns(settings: Settings) -> dict:
    """Latency of a streaming turn after 10, 200 and 1,000 utterances."""
    counts, reply, repeats = ((4, 8), 3, 1) if settings.dry_run else ((10, 200, 1000), 20, 3)
    dtype = torch.float32 if settings.dry_run else torch.bfloat16
    torch.manual_seed(0)
    model, processor = preset_parts(settings.preset, dtype, settings.device)
    conversations = {count: make_conversation(processor, count, UTTERANCE) for count in counts}
    found = measure_turns(model, processor, conversations, reply, repeats)
    shown = ", ".join(f"{1e3 * row['streaming']:.0f} ms at {count}" for count, row in found.items())
    return {
        "summary": f"a turn with a reply of {reply} tokens: {shown}",
        "reply_tokens": reply,
        "turns": {str(count): row for count, row in found.items()},
    }


def preferences(settings: Settings) -> dict:
    """EPOTrainer beside CPOTrainer, TRL's fused head and DPOTrainer at the 7B model's size."""
    line = ["--preset", settings.preset, "--device", settings.device, "--cases"]
    line += ["1", "--steps", "1"] if settings.dry_run else ["1", "3", "--steps", "3"]
    found = preference.main(line)
    measured = [case for case in found["cases"] if "ratios" in case]
    problems = [f"{case['name']}: {case['out_of_memory']}" for case in found["cases"] if "out_of_memory" in case]
    shown = [
        f"{case['name']}: {case['ratios']['seconds']:.2f} of CPOTrainer's time, {case['ratios']['memory']:.2f} of its "
        "memory"
        for case in measured
    ]
    if any(OURS not in case["costs"] for case in measured):
        problems.append("EPOTrainer was not measured")
    return {"summary": "; ".join(shown), **found, "problems": problems}


def _with_room(part: Callable[[Settings], dict]) -> Callable[[Settings], dict]:
    """Free what the part before used, where several run in one process."""

    def run(settings: Settings) -> dict:
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        return part(settings)

    run.__doc__ = part.__doc__
    return run


PARTS: dict[str, Callable[[Settings], dict]] = {
    "tests": _with_room(gpu_tests),
    "kernels": _with_room(kernels),
    "varlen": _with_room(varlen),
    "rehearsal": _with_room(full_size),
    "preference": _with_room(preferences),
    "turns": _with_room(turns),
    "efficiency": _with_room(table_3),
}
