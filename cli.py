"""The `empathic` command."""

import argparse
import os
import sys


def _quickstart(arguments) -> int:
    from empathic.quickstart import quickstart

    quickstart(arguments.output)
    return 0


def _prepare(arguments) -> int:
    from empathic.data_prep.folder import prepare_folder

    report = prepare_folder(
        arguments.raw,
        arguments.out,
        embed=arguments.embed,
        num_workers=arguments.num_workers,
        split_seed=arguments.split_seed,
    )
    print(f"{report['rows']} turns are in {arguments.out}.")
    for kind in ("left_out", "repaired"):
        for entry in report[kind][:10]:
            print(f"{kind.replace('_', ' ')}: {entry['item']}: {entry['reason']}")
        if len(report[kind]) > 10:
            print(f"... {len(report[kind]) - 10} more {kind.replace('_', ' ')}; all are in report.json.")
    return 0 if report["rows"] else 1


def _counter(arguments) -> int:
    import torch
    from datasets import load_dataset

    from empathic.data_prep.counter import build_pairs, write_pairs
    from empathic.data_prep.views import DialogueSamples
    from empathic.evaluation.emotion_features import EmotionFeatures
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = EmpathicForConditionalGeneration.from_pretrained(arguments.model, dtype="auto").to(device)
    processor = EmpathicProcessor.from_pretrained(arguments.model)
    features = EmotionFeatures(arguments.classifier, pooling=arguments.pooling, device=device)
    rows, reports = {}, {}
    for split in arguments.splits:
        samples = DialogueSamples(load_dataset(arguments.data, split=split), arguments.speakers)
        rows[split], reports[split] = build_pairs(
            samples,
            model,
            processor,
            features,
            threshold=arguments.threshold,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
        )
    write_pairs(rows, reports, arguments.out)
    return 0 if any(rows.values()) else 1


def _train(arguments, rest: list[str]) -> int:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if arguments.accelerate_config is not None:
        launch += ["--config_file", arguments.accelerate_config]
    os.execv(sys.executable, [*launch, "-m", "empathic.trainers.train", "--config", arguments.config, *rest])


def _merge(arguments) -> int:
    from empathic.trainers.checkpoint import merge

    merge(arguments.folder, arguments.output)
    print(f"One whole model is in {arguments.output}.")
    return 0


def _chat(arguments) -> int:
    from transformers import TextStreamer

    from empathic.chat import ChatSession
    from empathic.media_empathic import MediaError
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    model = EmpathicForConditionalGeneration.from_pretrained(arguments.model, dtype="auto").eval()
    processor = EmpathicProcessor.from_pretrained(arguments.model)
    session, clips = ChatSession(model, processor), {}
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("Say something. /audio FILE and /video FILE go with your next sentence (/clip FILE is both).")
    print("/save FILE and /load FILE keep a conversation, /new starts one, /quit ends.")
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if command in ("/audio", "/video", "/clip"):
                for kind in ("audio", "video") if command == "/clip" else (command[1:],):
                    clips[kind] = _readable(argument)
            elif command == "/save":
                session.save(argument)
            elif command == "/load":
                session = ChatSession.load(argument, model, processor)
            elif command == "/new":
                session, clips = ChatSession(model, processor), {}
            elif command == "/quit":
                return 0
            elif command.startswith("/"):
                print(f"There is no command {command}.")
            elif line or clips:
                pending, clips = clips, {}
                print("bot: ", end="", flush=True)
                session.reply(line, **pending, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
        except (MediaError, OSError, ValueError) as error:
            print(f"\n{error}")


def _readable(path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    return path


def _command(commands, name: str, run, help_text: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(prog="empathic", description="An audio-visual chatbot that hears how it is said.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = _command(
        commands,
        "quickstart",
        _quickstart,
        "train all five stages of the tiny preset and show what each taught",
        "empathic quickstart --output runs/quickstart",
    )
    sub.add_argument("--output", default="runs/quickstart", help="folder; a run that was stopped goes on (%(default)s)")

    sub = _command(
        commands,
        "prepare",
        _prepare,
        "turn a folder of recordings with a metadata.jsonl into a data set",
        "empathic prepare folder recordings data/recordings --num-workers 2",
    )
    sub.add_argument("corpus", choices=("folder",), help="layout of RAW: folder (your own recordings)")
    sub.add_argument("raw", metavar="RAW", help="folder that holds metadata.jsonl")
    sub.add_argument("out", metavar="OUT", help="folder to write; `datasets.load_dataset(OUT)` reads it")
    sub.add_argument("--embed", action="store_true", help="put the media's bytes into the data set")
    sub.add_argument("--num-workers", type=int, default=1, help="processes that probe clips (%(default)s)")
    sub.add_argument("--split-seed", type=int, default=0, help="decides the split where none is given (%(default)s)")

    sub = _command(
        commands,
        "counter",
        _counter,
        "write counter-emotional replies and select preference pairs (paper's Sec. 3.3)",
        "empathic counter --model runs/dialogue --data data/meld --out data/meld-pairs",
    )
    sub.add_argument("--model", required=True, help="the model that will be trained; its adapter is switched off")
    sub.add_argument("--data", required=True, help="folder of `empathic prepare`, or Hub id")
    sub.add_argument("--out", required=True, help="folder to write; stage epo takes it as its data set")
    sub.add_argument("--splits", nargs="+", default=["train"], help="splits to go through (%(default)s)")
    sub.add_argument("--speakers", nargs="+", help="whose replies, such as a corpus's assistant (everybody's)")
    sub.add_argument(
        "--classifier", default="SamLowe/roberta-base-go_emotions", help="text emotion classifier (%(default)s)"
    )
    sub.add_argument("--pooling", default="mean", help="its features: mean, cls or probabilities (%(default)s)")
    sub.add_argument("--threshold", type=float, default=0.1, help="a pair's similarity lies below it (%(default)s)")
    sub.add_argument("--batch_size", type=int, default=32, help="prompts generated at once (%(default)s)")
    sub.add_argument("--max_new_tokens", type=int, default=64, help="length of a reply at most (%(default)s)")
    sub.add_argument("--device", default=None, help="cuda or cpu (a GPU if there is one)")

    sub = _command(
        commands,
        "train",
        _train,
        "train one stage; further options override those of the YAML file",
        "empathic train --config recipes/tiny/emotion.yaml --learning_rate 5e-4",
    )
    sub.add_argument("--config", required=True, help="YAML file of the stage")
    sub.add_argument("--accelerate_config", help="configuration of `accelerate launch`")

    sub = _command(
        commands,
        "merge",
        _merge,
        "make one whole model of a stage's folder: adapters merged, all parts in place",
        "empathic merge runs/epo model",
    )
    sub.add_argument("folder", metavar="FOLDER", help="output folder of a stage")
    sub.add_argument("output", metavar="OUT", help="folder to write")

    sub = _command(commands, "chat", _chat, "talk to a model in the terminal", "empathic chat runs/quickstart/model")
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--max_new_tokens", type=int, default=128, help="length of a reply at most (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return arguments.run(arguments, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
