"""
Compare EPOTrainer with TRL's experimental CPOTrainer, on the same weights and pairs, in one run with one thread.

    python -m empathic.benchmarks.preference --output runs/benchmarks/preference.json
    python -m empathic.benchmarks.preference --sweep --output runs/benchmarks/preference_sweep.json
    python -m empathic.benchmarks.preference --preset qwen2.5-7b --output runs/benchmarks/preference_7b.json

CPOTrainer uses `loss_type="simpo"` and `cpo_alpha=1`, which is EPO's loss. A step is a forward and a backward pass,
without an optimizer. The language model is frozen, with an untied head; a LoRA adapter on its linear layers trains. The
model has random weights, Qwen2.5-7B's proportions and width 384: with the full vocabulary the head has a larger share
of the operations than in the 7B model, with 5,000 entries the same share.

Four anchors with the same loss show each saving apart: the fused head of TRL's DPOTrainer, which has no tensor of all
logits, with every position and with the replies only, as on a GPU; Liger's fused linear SimPO, if liger-kernel is
installed; and EPOTrainer's packing, which has no padding, with each prompt computed twice.

The report has the CPU time of a step (the median, alternating between the trainers), the operations that torch counts,
the peak bytes without the weights, and the largest absolute differences of loss and gradients. A bar chart of the
ratios lies next to the JSON file. `--sweep` varies prompt length, vocabulary and raggedness, one at a time and without
the anchors, and plots the ratios. The presets of public sizes need a GPU: without a GPU only their plan is printed. On
a GPU, time is wall-clock time, TRL's DPOTrainer with its own loss is one more side, and two shares of the device's peak
are reported: for the operations that a step needs mathematically (each prompt once, the head at the replies only; equal
for all trainers, so this is model FLOPs utilization), and for the counted operations.
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

from .flops import peak_tflops
from .machine import describe_machine
from .memory_plan import GIB, weight_bytes
from .preference_anchors import unavailable
from .preference_sides import (
    CPO,
    DPO,
    FULL,
    LADDER,
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
from .step_costs import Side, largest_difference, median_seconds, norms_in_full, operations, watched_step

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
QUANTITY_TITLES = {"operations": "FLOPs", "seconds": "time", "memory": "peak memory without the weights"}
SWEEP = {
    "prompt": ("prompt (tokens)", (64, 128, 256, 512)),
    "vocabulary": ("vocabulary (entries)", (SMALL, 32_000, FULL)),
    "raggedness": ("spread of the lengths of 4 pairs (share of their mean)", (0.0, 0.4, 0.8)),
}


def swept_case(axis: str, value: float) -> Case:
    """A pair with a prompt of 180 tokens and replies of 30; for raggedness, four pairs with these mean lengths."""
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
    """
    Run a step of each side; return the bytes by trainer and the differences between EPOTrainer and CPOTrainer.

    The differences have `losses` by side, and in `apart`, for each side with CPOTrainer's loss, its absolute
    differences from CPOTrainer in `loss` and `gradients` (the largest).
    """
    watched = {side.name: watched_step(side) for side in sides}
    by_name = {side.name: side for side in sides}
    losses = {name: watched[name][0] for name in by_name if name != DPO}
    apart, largest = {}, 0.0
    for name in losses.keys() - {CPO}:
        gradients, largest = largest_difference(by_name[name], by_name[CPO])
        apart[name] = {"loss": abs(losses[name] - losses[CPO]), "gradients": gradients}
    differences = {"losses": losses, **apart[OURS], "largest_gradient": largest, "apart": apart}
    return {name: memory for name, (_, memory) in watched.items()}, differences


def measure(case: Case, chosen: Preset, options: argparse.Namespace) -> dict:
    """Measure the differences, the costs by trainer and the ratios of a case."""
    on_gpu, with_anchors = options.device == "cuda", not options.sweep
    model, rows, differences = build(chosen, case.vocabulary, options.device), make_rows(case), {}
    with tempfile.TemporaryDirectory() as folder:
        if case.exact and chosen.dtype == "float32":
            with norms_in_full():
                differences["float64"] = compare(
                    make_sides(model.double(), case, rows, folder, with_anchors=with_anchors)
                )[1]
            model = model.float()
        sides = make_sides(model, case, rows, folder, on_gpu or options.dpo, with_anchors)
        memory, differences[chosen.dtype] = compare(sides)
        seconds = median_seconds(sides, options.steps)
        costs = {
            side.name: {"operations": operations(side), "seconds": seconds[side.name], "memory": memory[side.name]}
            for side in sides
        }
    peak = options.peak_tflops or (peak_tflops(torch.cuda.get_device_name()) if on_gpu else None)
    if peak is not None:  # `needed` has the same numerator for all trainers, so the utilizations are comparable
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
        "anchors": {
            side: {name: cost[name] / costs[CPO][name] for name in QUANTITIES}
            for side, cost in costs.items()
            if with_anchors and side != DPO
        },
        "differences": differences,
    }


def table_rows(found: dict, wanted: dict[str, float]) -> list[dict]:
    """Return the table's rows of a case; `compared` is a ratio or a difference."""
    lines, costs = [], {name: cost for name, cost in found["costs"].items() if name in (OURS, CPO, DPO)}
    for name, (unit, scale) in QUANTITIES.items():
        values = {trainer: cost[name] / scale for trainer, cost in costs.items()}
        line = {"quantity": f"{name}, {unit}", "values": values, "compared": found["ratios"][name]}
        lines.append(line | {"wanted": wanted.get(name)})
    for name in ("needed", "counted"):
        values = {trainer: cost[name] for trainer, cost in costs.items() if name in cost}
        if values:
            line = {"quantity": f"FLOPs utilization, {name}", "values": values, "wanted": None}
            lines.append(line | {"compared": values[OURS] / values[CPO]})
    for dtype, differences in found["differences"].items():
        limit = LARGEST_DIFFERENCE if dtype == "float64" else None
        values = {name: differences["losses"][name] for name in (OURS, CPO)}
        line = {"quantity": f"loss, {dtype}", "values": values, "compared": differences["loss"]}
        lines.append(line | {"wanted": limit})
        values = {CPO: differences["largest_gradient"]}
        line = {"quantity": f"gradients (the largest), {dtype}", "values": values}
        lines.append(line | {"compared": differences["gradients"], "wanted": limit})
    for line in lines:
        line["case"] = found["name"]
        line["holds"] = None if line["wanted"] is None else line["compared"] <= line["wanted"]
    return lines


def markdown(lines: list[dict]) -> str:
    """Format the rows of `table_rows` as a Markdown table."""
    trainers = list(dict.fromkeys(name for line in lines for name in line["values"]))
    heads = ["case", "quantity", *trainers, "ratio or difference", "required", "holds"]
    text = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in lines:
        values = [f"{line['values'][name]:.4g}" if name in line["values"] else "" for name in trainers]
        wanted = "" if line["wanted"] is None else f"<= {line['wanted']:g}"
        holds = {None: "", True: "yes", False: "no"}[line["holds"]]
        cells = [line["case"], line["quantity"], *values, f"{line['compared']:.3g}", wanted, holds]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def anchor_markdown(cases: list[dict]) -> str:
    """Format the costs of CPOTrainer's loss as shares of CPOTrainer's, each saving after the other."""
    dtypes = list(dict.fromkeys(dtype for found in cases for dtype in found["differences"]))
    heads = [*QUANTITIES, *(f"{what}, {dtype}" for dtype in dtypes for what in ("loss", "gradients"))]
    text = ["| case | side | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for found in cases:
        for side in LADDER:
            if side not in found["anchors"]:
                continue
            cells = [f"{found['anchors'][side][name]:.3f}" for name in QUANTITIES]
            for dtype in dtypes:
                apart = found["differences"].get(dtype, {}).get("apart", {}).get(side)
                cells += ["", ""] if apart is None else [f"{apart['loss']:.0e}", f"{apart['gradients']:.0e}"]
            text.append(f"| {found['name']} | {side} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def sweep_markdown(sweep: dict[str, list[dict]]) -> str:
    """Format the ratios of EPOTrainer to CPOTrainer by the varied quantity."""
    text = ["| varied | value | operations | time | memory |", "|---|---|---|---|---|"]
    for axis, points in sweep.items():
        for point in points:
            ratios = [f"{point['ratios'][name]:.3f}" for name in QUANTITIES]
            text.append(f"| {axis} | {point['value']:g} | " + " | ".join(ratios) + " |")
    return "\n".join(text)


def plot_anchors(cases: list[dict], path: Path) -> None:
    """Plot the ratios of each side to CPOTrainer as bars, with a panel for each quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = [side for side in LADDER if any(side in found["anchors"] for found in cases)]
    high = 0.8 / len(sides)
    figure, panels = pyplot.subplots(
        1, len(QUANTITIES), figsize=(11, 0.6 + 1.35 * len(cases)), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (quantity, title) in zip(panels[0], QUANTITY_TITLES.items(), strict=True):
        for place, side in enumerate(sides):
            found = [
                (row + place * high, case["anchors"][side]) for row, case in enumerate(cases) if side in case["anchors"]
            ]
            panel.barh([y for y, _ in found], [ratios[quantity] for _, ratios in found], high, label=side)
        panel.axvline(1.0, color="grey", linewidth=0.8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("share of CPOTrainer's")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks([row + 0.4 - high / 2 for row in range(len(cases))], [case["name"] for case in cases])
    panels[0][0].invert_yaxis()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    with pyplot.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)
    pyplot.close(figure)


def plot(sweep: dict[str, list[dict]], path: Path) -> None:
    """Plot the ratios, with a panel for each varied quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweep), figsize=(4.2 * len(sweep), 3.6), sharey=True, squeeze=False)
    for panel, (axis, points) in zip(panels[0], sweep.items(), strict=True):
        for name, label in QUANTITY_TITLES.items():
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
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="python -m empathic.benchmarks.preference", description=__doc__.strip().split("\n")[0]
    )
    presets = ("small", "tiny", "qwen2.5-0.5b", "qwen2.5-7b")
    parser.add_argument("--preset", choices=presets, default="small", help="Language model (%(default)s).")
    parser.add_argument("--steps", type=int, default=3, help="Timed steps of each trainer (%(default)s).")
    parser.add_argument("--cases", type=int, nargs="+", help=f"Numbers of the cases, from 1 to {len(CASES)}; else all.")
    parser.add_argument("--sweep", action="store_true", help="Vary lengths and vocabulary instead of using the cases.")
    parser.add_argument("--dpo", action="store_true", help="Run TRL's DPOTrainer on a CPU too.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="Default: cpu for small and tiny, else cuda.")
    parser.add_argument("--peak_tflops", type=float, help="The device's dense bf16 peak, if it is unknown.")
    parser.add_argument(
        "--output", type=Path, help="JSON file; the plot has the same name with .svg, or for a sweep .png."
    )
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.cases is not None and not all(1 <= number <= len(CASES) for number in options.cases):
        parser.error(f"--cases must be numbers from 1 to {len(CASES)}, got {options.cases}")
    options.device = options.device or ("cpu" if options.preset in ("small", "tiny") else "cuda")
    return options


def cases_of(chosen: Preset, options: argparse.Namespace) -> list[Case]:
    """Return the requested cases in the preset's sizes; public models have the full vocabulary only."""
    cases = [CASES[number - 1] for number in options.cases or range(1, len(CASES) + 1)]
    if options.preset != "small":  # the required ratios are for `small` only
        cases = [replace(case, wanted={}) for case in cases]
    if options.preset.startswith("qwen"):
        cases = [case for case in cases if case.vocabulary == FULL]
    return [case.scaled(chosen.divisor, chosen.full if case.vocabulary == FULL else chosen.small) for case in cases]


def plan(cases: list[Case], chosen: Preset) -> list[dict]:
    """Compute the sizes and operations of each case, from a model without storage."""
    planned = []
    for case in cases:
        model = build(chosen, case.vocabulary, "meta")
        needed, rows = (operations_of(model, case, shared) / 1e12 for shared in (True, False))
        sizes = {"weights_gib": weight_bytes(model) / GIB, "needed_tflops": needed, "rows_tflops": rows}
        planned.append({"name": case.name, "lengths": case.lengths, "vocabulary": case.vocabulary, **sizes})
    return planned


def describe(planned: dict) -> str:
    """Describe a planned case."""
    return (
        f"{planned['name']}: vocabulary {planned['vocabulary']:,}, weights {planned['weights_gib']:.2f} GiB; "
        f"a step needs {planned['needed_tflops']:.3g} TFLOPs (prompts once, the head at the replies only), "
        f"{planned['rows_tflops']:.3g} as two padded rows per pair with all logits: ratio "
        f"{planned['needed_tflops'] / planned['rows_tflops']:.2f}"
    )


def measure_all(cases: list[Case], chosen: Preset, options: argparse.Namespace) -> list[dict]:
    """Measure each case; running out of memory is recorded as a result."""
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
    """Measure or plan the cases, print tables, and return and write all results."""
    options = parse(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)  # from TRL
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
        f"{'tied' if config.tie_word_embeddings else 'untied'} head, frozen; LoRA of rank {chosen.rank} trains. "
        f"{result['step']}; median of {options.steps} steps; {torch.get_num_threads()} thread.\n"
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
        result["skipped"] = unavailable()
        print(markdown(result["table"]))
        anchored = [found for found, _ in measured]
        print(f"\nThe same loss, as shares of {CPO}'s cost, and differences from its loss and gradients:\n")
        print(anchor_markdown(anchored))
        for name, reason in result["skipped"].items():
            print(f"\nNot measured: {name} ({reason}).")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if result.get("table"):
            plot_anchors(anchored, options.output.with_suffix(".svg"))
        if "sweep" in result:
            plot(result["sweep"], options.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
