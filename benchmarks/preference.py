"""
EPOTrainer beside TRL's experimental CPOTrainer, on the same weights and pairs, in one run of one thread.

    python -m empathic.benchmarks.preference --output runs/benchmarks/preference.json
    python -m empathic.benchmarks.preference --sweep --output runs/benchmarks/preference_sweep.json
    python -m empathic.benchmarks.preference --preset qwen2.5-7b --output runs/benchmarks/preference_7b.json

CPOTrainer has `loss_type="simpo"` and `cpo_alpha=1`, which is EPO's loss. A step is forward and backward, without an
optimizer. The language model is frozen, with a head of its own; a LoRA adapter on its linear layers trains. Random
weights of Qwen2.5-7B's proportions, of width 384: with the full vocabulary the head then weighs more than at 7B, with
5,000 entries it takes the share of the operations that it takes at 7B.

Reported are the CPU time of a step (the median, the trainers taking turns), the operations that torch counts, the peak
of the bytes beside the weights, and the largest absolute difference of loss and gradients. `--sweep` varies one of
prompt length, vocabulary and raggedness at a time, and draws the ratios beside the JSON file. The presets of public
sizes need a GPU: without one their plan is printed. On it, time is by the clock, TRL's DPOTrainer with its fused head
is a third side, and the share of the device's peak is told: of the operations that the mathematics needs (each prompt
once, the head at the replies; the same for all, so this is model FLOPs utilisation), and of those that were counted.
"""

import argparse
import json
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import datasets
import torch
import transformers

from empathic.benchmarks.flops import peak_tflops
from empathic.benchmarks.machine import describe_machine
from empathic.benchmarks.memory_plan import GIB, weight_bytes
from empathic.benchmarks.preference_sides import (
    CPO,
    FULL,
    OURS,
    SMALL,
    Case,
    Preset,
    build,
    make_rows,
    make_sides,
    operations_of,
    preset,
)
from empathic.benchmarks.step_costs import (
    Side,
    largest_difference,
    median_seconds,
    norms_in_full,
    operations,
    watched_step,
)

RAGGED = ((110, 20, 40), (150, 40, 25), (200, 30, 35), (250, 35, 20))
CASES = (
    Case("P 256, C 32", ((256, 32, 32),), wanted={"operations": 0.25, "seconds": 0.30, "memory": 0.18}),
    Case("P 180, C 30, small vocabulary", ((180, 30, 30),), SMALL, wanted={"seconds": 0.60}),
    Case("4 ragged pairs", RAGGED, exact=False, wanted={"seconds": 0.20, "memory": 0.12}),
    Case("4 ragged pairs, small vocabulary", RAGGED, SMALL, wanted={"seconds": 0.45}),
    Case("P 256, C 32, checkpointing", ((256, 32, 32),), checkpointing=True, exact=False, wanted={"memory": 0.18}),
)
LARGEST_DIFFERENCE = 1e-8  # in fp64
QUANTITIES = {"operations": ("GFLOP", 1e9), "seconds": ("s", 1.0), "memory": ("MiB", 2**20)}
SWEEP = {
    "prompt": ("prompt (tokens)", (64, 128, 256, 512)),
    "vocabulary": ("vocabulary (entries)", (SMALL, 32_000, FULL)),
    "raggedness": ("spread of the lengths of 4 pairs (share of their mean)", (0.0, 0.4, 0.8)),
}


def swept_case(axis: str, value: float) -> Case:
    """One pair of a prompt of 180 tokens and replies of 30; of raggedness, four with these means."""
    name, one = f"{axis} {value:g}", (180, 30, 30)
    if axis == "prompt":
        return Case(name, ((int(value), 30, 30),), SMALL, exact=False)
    if axis == "vocabulary":
        return Case(name, (one,), int(value), exact=False)
    orders = ((-1, 1, -1 / 3), (-1 / 3, -1, 1), (1 / 3, -1 / 3, -1), (1, 1 / 3, 1 / 3))
    lengths = tuple(
        tuple(round(mean * (1 + value * share)) for mean, share in zip(one, order, strict=True)) for order in orders
    )
    return Case(name, lengths, SMALL, exact=False)


def compare(sides: list[Side]) -> tuple[dict[str, int], dict]:
    """A step of each -> its bytes of memory by trainer, and how far EPOTrainer and CPOTrainer lie apart."""
    watched = {side.name: watched_step(side) for side in sides}
    losses = {side.name: watched[side.name][0] for side in sides[:2]}
    gradients, largest = largest_difference(*sides[:2])
    apart = {"loss": abs(losses[OURS] - losses[CPO]), "gradients": gradients, "largest_gradient": largest}
    return {name: memory for name, (_, memory) in watched.items()}, {"losses": losses, **apart}


def measure(case: Case, chosen: Preset, options: argparse.Namespace) -> dict:
    """Differences, costs by trainer and ratios of one case."""
    on_gpu = options.device == "cuda"
    model, rows, differences = build(chosen, case.vocabulary, options.device), make_rows(case), {}
    with tempfile.TemporaryDirectory() as folder:
        if case.exact and chosen.dtype == "float32":
            with norms_in_full():
                differences["float64"] = compare(make_sides(model.double(), case, rows, folder))[1]
            model = model.float()
        sides = make_sides(model, case, rows, folder, with_dpo=on_gpu or options.dpo)
        memory, differences[chosen.dtype] = compare(sides)
        seconds = median_seconds(sides, options.steps)
        costs = {
            side.name: {"operations": operations(side), "seconds": seconds[side.name], "memory": memory[side.name]}
            for side in sides
        }
    peak = options.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if on_gpu else None)
    if peak is not None:  # one numerator for all: who wastes less of the same work has the higher utilisation
        for cost in costs.values():
            cost["needed"] = operations_of(model, case, shared=True) / cost["seconds"] / (peak * 1e12)
            cost["counted"] = cost["operations"] / cost["seconds"] / (peak * 1e12)
    return {
        "name": case.name,
        "vocabulary": case.vocabulary,
        "lengths": case.lengths,
        "checkpointing": case.checkpointing,
        "costs": costs,
        "ratios": {name: costs[OURS][name] / costs[CPO][name] for name in QUANTITIES},
        "differences": differences,
    }


def table_rows(found: dict, wanted: dict[str, float]) -> list[dict]:
    """The table's lines of one case: `compared` is a ratio, or a difference."""
    lines = []
    for name, (unit, scale) in QUANTITIES.items():
        values = {trainer: cost[name] / scale for trainer, cost in found["costs"].items()}
        line = {"quantity": f"{name}, {unit}", "values": values, "compared": found["ratios"][name]}
        lines.append(line | {"wanted": wanted.get(name)})
    for name in ("needed", "counted"):
        values = {trainer: cost[name] for trainer, cost in found["costs"].items() if name in cost}
        if values:
            line = {"quantity": f"FLOPs utilisation, {name}", "values": values, "wanted": None}
            lines.append(line | {"compared": values[OURS] / values[CPO]})
    for dtype, differences in found["differences"].items():
        limit = LARGEST_DIFFERENCE if dtype == "float64" else None
        line = {"quantity": f"loss, {dtype}", "values": differences["losses"], "compared": differences["loss"]}
        lines.append(line | {"wanted": limit})
        values = {CPO: differences["largest_gradient"]}
        line = {"quantity": f"gradients (the largest), {dtype}", "values": values}
        lines.append(line | {"compared": differences["gradients"], "wanted": limit})
    for line in lines:
        line["case"] = found["name"]
        line["holds"] = None if line["wanted"] is None else line["compared"] <= line["wanted"]
    return lines


def markdown(lines: list[dict]) -> str:
    """The lines of `table_rows` as a table."""
    trainers = list(dict.fromkeys(name for line in lines for name in line["values"]))
    heads = ["case", "quantity", *trainers, "ratio or difference", "wanted", "holds"]
    text = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in lines:
        values = [f"{line['values'][name]:.4g}" if name in line["values"] else "" for name in trainers]
        wanted = "" if line["wanted"] is None else f"<= {line['wanted']:g}"
        holds = {None: "", True: "yes", False: "no"}[line["holds"]]
        cells = [line["case"], line["quantity"], *values, f"{line['compared']:.3g}", wanted, holds]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def sweep_markdown(sweep: dict[str, list[dict]]) -> str:
    """Ratios of EPOTrainer to CPOTrainer by what was varied."""
    text = ["| varied | value | operations | time | memory |", "|---|---|---|---|---|"]
    for axis, points in sweep.items():
        for point in points:
            ratios = [f"{point['ratios'][name]:.3f}" for name in QUANTITIES]
            text.append(f"| {axis} | {point['value']:g} | " + " | ".join(ratios) + " |")
    return "\n".join(text)


def plot(sweep: dict[str, list[dict]], path: Path) -> None:
    """One panel for each thing that was varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweep), figsize=(4.2 * len(sweep), 3.6), sharey=True, squeeze=False)
    labels = {"operations": "FLOPs", "seconds": "time", "memory": "peak memory beside the weights"}
    for panel, (axis, points) in zip(panels[0], sweep.items(), strict=True):
        for name, label in labels.items():
            panel.plot([p["value"] for p in points], [p["ratios"][name] for p in points], marker="o", label=label)
        if axis != "raggedness":
            panel.set_xscale("log", base=2)
            panel.set_xticks([p["value"] for p in points], [f"{p['value']:,}" for p in points])
            panel.minorticks_off()
        panel.set_xlabel(SWEEP[axis][0])
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("EPOTrainer / CPOTrainer (ratio)")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m empathic.benchmarks.preference", description=__doc__.strip().split("\n")[0]
    )
    presets = ("small", "tiny", "qwen2.5-0.5b", "qwen2.5-7b")
    parser.add_argument("--preset", choices=presets, default="small", help="Language model (%(default)s).")
    parser.add_argument("--steps", type=int, default=3, help="Timed steps of each trainer (%(default)s).")
    parser.add_argument("--cases", type=int, nargs="+", help=f"Numbers of the cases, from 1 to {len(CASES)}; else all.")
    parser.add_argument("--sweep", action="store_true", help="Vary lengths and vocabulary in place of the cases.")
    parser.add_argument("--dpo", action="store_true", help="TRL's DPOTrainer also on a CPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu for small and tiny, cuda for the others.")
    parser.add_argument("--peak_tflops", type=float, help="The device's dense bf16 peak, where it is not known.")
    parser.add_argument("--output", type=Path, help="JSON file; the sweep's plot lies beside it as .png.")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.cases is not None and not all(1 <= number <= len(CASES) for number in options.cases):
        parser.error(f"--cases must be numbers from 1 to {len(CASES)}, got {options.cases}")
    options.device = options.device or ("cpu" if options.preset in ("small", "tiny") else "cuda")
    return options


def cases_of(chosen: Preset, options: argparse.Namespace) -> list[Case]:
    """The asked-for cases in the preset's sizes; a public model has its own vocabulary only."""
    cases = [CASES[number - 1] for number in options.cases or range(1, len(CASES) + 1)]
    if options.preset != "small":  # for which the ratios are wanted
        cases = [replace(case, wanted={}) for case in cases]
    if options.preset.startswith("qwen"):
        cases = [case for case in cases if case.vocabulary == FULL]
    return [case.scaled(chosen.divisor, chosen.full if case.vocabulary == FULL else chosen.small) for case in cases]


def plan(cases: list[Case], chosen: Preset) -> list[dict]:
    """What each case would be, from a model without storage."""
    planned = []
    for case in cases:
        model = build(chosen, case.vocabulary, "meta")
        needed, rows = (operations_of(model, case, shared) / 1e12 for shared in (True, False))
        sizes = {"weights_gib": weight_bytes(model) / GIB, "needed_tflops": needed, "rows_tflops": rows}
        planned.append({"name": case.name, "lengths": case.lengths, "vocabulary": case.vocabulary, **sizes})
    return planned


def describe(planned: dict) -> str:
    """A planned case in words."""
    return (
        f"{planned['name']}: vocabulary {planned['vocabulary']:,}, weights {planned['weights_gib']:.2f} GiB; "
        f"{planned['needed_tflops']:.3g} TFLOPs a step are needed (prompts once, the head at the replies), "
        f"{planned['rows_tflops']:.3g} as two padded rows a pair with all logits: "
        f"{planned['needed_tflops'] / planned['rows_tflops']:.2f}"
    )


def measure_all(cases: list[Case], chosen: Preset, options: argparse.Namespace) -> list[dict]:
    """`measure` of each case, where a device that is too small is a result as well."""
    found = []
    for case in cases:
        try:
            with redirect_stdout(sys.stderr):
                found.append(measure(case, chosen, options))
            ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found[-1]["ratios"].items())
            print(f"{case.name}: {ratios}", file=sys.stderr)
        except torch.OutOfMemoryError as error:
            found.append({"name": case.name, "out_of_memory": str(error).splitlines()[0]})
            print(f"{case.name}: out of memory ({found[-1]['out_of_memory']})")
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return found


def main(argv: list[str] | None = None) -> dict:
    """Measures what it can, prints tables, and returns (and writes) everything."""
    options = parse(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)  # TRL's calls
    chosen = preset(options.preset)
    config = chosen.config
    result = {
        "command": " ".join(["python -m empathic.benchmarks.preference", *(sys.argv[1:] if argv is None else argv)]),
        "model": {
            "preset": options.preset,
            "dtype": chosen.dtype,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "layers": config.num_hidden_layers,
            "tied_head": config.tie_word_embeddings,
            "lora_rank": chosen.rank,
        },
        "step": "Forward and backward, no optimizer",
        "timed_steps": options.steps,
        "machine": describe_machine(options.device),
    }
    print(
        f"Random {chosen.dtype} weights: width {config.hidden_size}, {config.num_hidden_layers} layers, "
        f"{'a tied' if config.tie_word_embeddings else 'its own'} head, frozen; LoRA of rank {chosen.rank} trains. "
        f"{result['step']}; median of {options.steps}; {torch.get_num_threads()} thread.\n"
    )
    if options.sweep:
        points = {axis: [swept_case(axis, value) for value in values] for axis, (_, values) in SWEEP.items()}
        if chosen.divisor > 1:
            points = {
                axis: [case.scaled(chosen.divisor, chosen.small) for case in cases] for axis, cases in points.items()
            }
    else:
        points = {"cases": cases_of(chosen, options)}
    if options.device == "cuda" and not torch.cuda.is_available():
        result["plan"] = plan([case for cases in points.values() for case in cases], chosen)
        print("\n".join(map(describe, result["plan"])))
        print("Nothing was measured: there is no GPU here.")
    elif options.sweep:
        result["sweep"] = {}
        for axis, cases in points.items():
            found = measure_all(cases, chosen, options)
            found = [
                {"value": value, **one} for value, one in zip(SWEEP[axis][1], found, strict=True) if "ratios" in one
            ]
            result["sweep"][axis] = found
        print(sweep_markdown(result["sweep"]))
    else:
        result["cases"] = measure_all(points["cases"], chosen, options)
        measured = [pair for pair in zip(result["cases"], points["cases"], strict=True) if "costs" in pair[0]]
        result["table"] = [line for found, case in measured for line in table_rows(found, case.wanted)]
        print(markdown(result["table"]))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if "sweep" in result:
            plot(result["sweep"], options.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
