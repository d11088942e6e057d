"""`empathic evaluate`: reproduce the paper's tables, with one subcommand per table."""

from ..benchmarks.efficiency_options import add_options, positive
from ..benchmarks.memory_qa import ARMS as MEMORY_ARMS
from ..evaluation.reply_options import (
    add_contrast_options,
    add_dialogue_options,
    add_emotion_options,
    add_judge_options,
    as_arguments,
)
from ..processes import launch
from . import add_command

SYSTEM = (
    "NAME=KIND:TARGET[,option=value...]; kinds: empathic:PATH_OR_ID with the options history (memory, text, none) and "
    "media (true, false), chat:ID, audio:ID, video:ID, openai:MODEL@BASE_URL; options of every kind: batch_size, "
    "max_new_tokens, temperature, top_p, dtype, repetition_penalty, no_repeat_ngram_size"
)


def reconstruction(arguments) -> int:
    """Compute Table 8."""
    from ..evaluation.reconstruction import ReconstructionOptions, run

    options = ReconstructionOptions(
        utterances=arguments.utterances,
        split=arguments.split,
        max_runs=arguments.max_runs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=arguments.device,
        bertscore_model=None if arguments.bertscore_model == "none" else arguments.bertscore_model,
        bertscore_layer=arguments.bertscore_layer,
        examples=arguments.examples,
        compare=arguments.compare,
    )
    results = run(arguments.model, arguments.data, arguments.output, options)
    for length, row in results["scores"].items():
        values = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"{length} at once ({results['runs'][length]} runs): {values}")
    print(f"BERTScore: {results['bertscore']}. All results are in {arguments.output}.")
    return 0


def efficiency(arguments) -> int:
    """Compute Table 3."""
    from ..benchmarks.efficiency import run

    run(arguments)
    return 0


def memory(arguments) -> int:
    """Answer questions about long conversations."""
    from ..benchmarks.memory_qa.run import markdown, run

    print(markdown(run(arguments)))
    print(f"All results are in {arguments.output}.")
    return 0


def report(arguments) -> int:
    """Report all results of a folder."""
    from ..evaluation.report.build import write_report

    path = write_report(arguments.folders, arguments.output, arguments.samples)
    print(f"Open {path}; report.md and tables.tex are beside it.")
    return 0


def of_replies(table: str, arguments, add_its_options, positional: str, run) -> int:
    """Run an evaluation of replies in this process, or run the same command through `accelerate launch`."""
    if arguments.accelerate_config is not None:
        again = ["evaluate", table, *as_arguments(arguments, add_its_options, positional)]
        return launch("empathic.cli", again, arguments.accelerate_config)
    return run()


def dialogue(arguments) -> int:
    """Compute Table 1."""
    from ..evaluation.dialogue import run

    return of_replies("dialogue", arguments, add_dialogue_options, "systems", lambda: run(arguments, "dialogue"))


def ablation(arguments) -> int:
    """Compute Table 2."""
    from ..evaluation.dialogue import run

    return of_replies("ablation", arguments, add_dialogue_options, "systems", lambda: run(arguments, "ablation"))


def emotion(arguments) -> int:
    """Compute Fig. 6."""
    from ..evaluation.emotion import run

    return of_replies("emotion", arguments, add_emotion_options, "model", lambda: run(arguments))


def contrast(arguments) -> int:
    """Compare the replies to the same words with clips of different emotions."""
    from ..evaluation.contrast.table import run

    return of_replies("contrast", arguments, add_contrast_options, "systems", lambda: run(arguments))


def judge(arguments) -> int:
    """Judge saved replies by a rubric."""
    from ..evaluation.judge.table import run

    return run(arguments)


def add_dialogue(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "dialogue",
        dialogue,
        "score the replies of several systems in held-out conversations (paper's Table 1)",
        "empathic evaluate dialogue ours=empathic:runs/quickstart/epo base=empathic:runs/quickstart/dialogue "
        "--data runs/quickstart/data",
    )
    sub.add_argument("systems", nargs="+", metavar="SYSTEM", help=SYSTEM)
    add_dialogue_options(sub)


def add_contrast(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "contrast",
        contrast,
        "give the same words with clips of different emotions: does the reply follow the voice and the face?",
        "empathic evaluate contrast ours=empathic:runs/quickstart/epo deaf=empathic:runs/quickstart/epo,media=false "
        "--data runs/quickstart/contrast_data --classifier runs/quickstart/parts/emotion_classifier",
    )
    sub.add_argument("systems", nargs="+", metavar="SYSTEM", help=SYSTEM)
    add_contrast_options(sub)


def add_ablation(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "ablation",
        ablation,
        "score the contributions of text history, memory, media and EPO (paper's Table 2)",
        "empathic evaluate ablation text=runs/qwen2.5-7b/dialogue_ft memory=runs/qwen2.5-7b/dialogue_mc "
        "memory_av=runs/qwen2.5-7b/dialogue_mc_av epo=runs/qwen2.5-7b/epo --data data/iemocap",
    )
    sub.add_argument(
        "systems", nargs="+", metavar="ROW=PATH",
        help="rows text, memory, memory_av and epo: folders of the recipes dialogue_ft, dialogue_mc, dialogue_mc_av "
        "and epo, each with the inputs of its recipe; base=KIND:TARGET: the model before fine-tuning",
    )  # fmt: skip
    add_dialogue_options(sub)


def add_judge(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "judge",
        judge,
        "let a model that hears or sees the clip judge saved replies by a rubric",
        "empathic evaluate judge openai:gpt-audio,media=audio,price_in=2.5,price_out=10 "
        "runs/tables/dialogue/ours.jsonl runs/tables/dialogue/base.jsonl --study study",
    )
    sub.add_argument(
        "judge", metavar="JUDGE",
        help="openai:MODEL@BASE_URL[,option=value...]: an OpenAI-compatible endpoint; media=audio, frames or both "
        "gives it the clip; further options as of the systems of `dialogue`",
    )  # fmt: skip
    sub.add_argument(
        "replies", nargs="+", metavar="REPLIES", help="files of saved replies to the same prompts, FILE or NAME=FILE"
    )
    add_judge_options(sub)


def add_emotion(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "emotion",
        emotion,
        "name the emotion of held-out clips from text, audio and video (paper's Fig. 6)",
        "empathic evaluate emotion runs/quickstart/emotion --data runs/quickstart/data",
    )
    sub.add_argument("model", metavar="MODEL", help="whole checkpoint, stage's folder or Hub id")
    add_emotion_options(sub)


def add_reconstruction(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "reconstruction",
        reconstruction,
        "rebuild utterances of held-out conversations from their memory vectors (paper's Table 8)",
        "empathic evaluate reconstruction runs/quickstart/memory_multi runs/quickstart/data --utterances 1 5",
    )
    sub.add_argument("model", metavar="MODEL", help="whole checkpoint, stage's folder or Hub id")
    sub.add_argument("data", metavar="DATA", help="prepared data set, folder or Hub id")
    sub.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="folder to write (%(default)s)")
    sub.add_argument(
        "--utterances", type=positive, nargs="+", default=[1, 5, 10, 20], metavar="N",
        help="numbers of utterances to rebuild at once (default: 1 5 10 20)",
    )  # fmt: skip
    sub.add_argument("--split", default="test", help="split of DATA, not seen in training (%(default)s)")
    sub.add_argument(
        "--max_runs", type=positive, default=200, metavar="N", help="maximum runs per length (%(default)s)"
    )
    sub.add_argument("--batch_size", type=positive, default=32, help="runs per batch (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed for choosing the runs (%(default)s)")
    sub.add_argument("--device", help="device such as cpu or cuda:0 (default: a GPU if there is one)")
    sub.add_argument(
        "--bertscore_model", default="roberta-large", metavar="ID",
        help="Hub id or folder; none to skip BERTScore (%(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--bertscore_layer", type=positive, metavar="N", help="layer to use, needed if the model is a folder"
    )
    sub.add_argument("--examples", type=int, default=3, metavar="N", help="examples per length to save (%(default)s)")
    sub.add_argument(
        "--compare", nargs="+", default=[], metavar="FOLDER",
        help="output folders for other checkpoints, drawn in the same plot of quality by memory vectors per token",
    )  # fmt: skip


def add_efficiency(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "efficiency",
        efficiency,
        "measure the cost of a conversation's history (paper's Table 3)",
        "empathic evaluate efficiency --preset tiny --turns 1 10 200",
    )
    add_options(sub)


def add_memory(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "memory",
        memory,
        "answer questions about long conversations from the text, from retrieved turns and from the memory",
        "empathic evaluate memory runs/quickstart/model locomo10.json --max_questions 50 --top_k 5",
    )
    sub.add_argument("model", metavar="MODEL", help="whole checkpoint, stage's folder or Hub id")
    sub.add_argument(
        "data", metavar="FILE", help="JSON file of LoCoMo, LongMemEval or ES-MemEval, recognized by its keys"
    )
    sub.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="folder to write (%(default)s)")
    sub.add_argument(
        "--arms", nargs="+", choices=MEMORY_ARMS, default=list(MEMORY_ARMS), metavar="ARM",
        help=f"what the prompt has of the conversation: {', '.join(MEMORY_ARMS)} (default: all)",
    )  # fmt: skip
    sub.add_argument(
        "--max_questions", type=positive, metavar="N", help="questions to answer, chosen by --seed (default: all)"
    )
    sub.add_argument("--last", type=positive, default=20, metavar="N", help="turns in the arm last (%(default)s)")
    sub.add_argument("--top_k", type=positive, default=10, metavar="N", help="retrieved turns (%(default)s)")
    sub.add_argument(
        "--retriever", default="sentence-transformers/all-MiniLM-L6-v2", metavar="ID",
        help="model of sentence-transformers, Hub id or folder; memory compares the memory's own vectors (%(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--corrections", metavar="FILE", help="LoCoMo: corrected answer keys, as its published audits have them"
    )
    sub.add_argument("--max_new_tokens", type=positive, default=32, help="maximum length of an answer (%(default)s)")
    sub.add_argument(
        "--max_positions", type=positive, metavar="N", help="maximum length of a prompt (default: the model's)"
    )
    sub.add_argument(
        "--max_memories", type=positive, metavar="N", help="maximum memory vectors in a prompt (default: all that fit)"
    )
    sub.add_argument(
        "--batch_size", type=positive, default=1, metavar="N",
        help="questions answered together, which is faster; the seconds are then their mean (%(default)s)",
    )  # fmt: skip
    sub.add_argument("--device", help="device such as cpu or cuda:0 (default: a GPU if there is one)")
    sub.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    sub.add_argument("--seed", type=int, default=0, help="seed for choosing the questions (%(default)s)")


def add_report(commands) -> None:
    """Add the subcommand."""
    sub = add_command(
        commands,
        "report",
        report,
        "write all results of a folder as a web page, as Markdown and as LaTeX tables",
        "empathic evaluate report runs/evaluation study",
    )
    sub.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folders of evaluations and studies; direct subfolders count too"
    )
    sub.add_argument("--output", metavar="FOLDER", help="folder to write (the first FOLDER)")
    sub.add_argument(
        "--samples", type=int, default=6, metavar="N", help="conversations shown for each data set (%(default)s)"
    )


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "evaluate",
        None,
        "compute a table of the paper",
        "empathic evaluate efficiency --preset tiny --paper",
    )
    tables = sub.add_subparsers(dest="table", required=True, metavar="TABLE")
    for add_one in (
        add_dialogue,
        add_ablation,
        add_contrast,
        add_judge,
        add_emotion,
        add_reconstruction,
        add_memory,
        add_efficiency,
        add_report,
    ):
        add_one(tables)
