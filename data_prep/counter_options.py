"""The options of `empathic counter`, and of `accelerate launch -m empathic.data_prep.counter`."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser."""
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", help="the model that will be trained, which writes with its adapters off")
    who.add_argument("--generator", help="Hub id or folder of any causal language model that writes instead")
    add = parser.add_argument
    add("--data", required=True, help="folder of `empathic prepare`, or Hub id")
    add("--out", required=True, help="folder to write; stage epo takes it as its data set")
    add("--splits", nargs="+", default=["train"], help="splits to go through (%(default)s)")
    add("--speakers", nargs="+", help="whose replies, such as a corpus's assistant (everybody's)")
    add("--max_samples", type=int, help="only the first so many of each split")
    add("--classifier", default="SamLowe/roberta-base-go_emotions", help="text emotion classifier (%(default)s)")
    add("--pooling", default="mean", help="its features: mean, cls, head or probabilities (%(default)s)")
    add("--threshold", type=float, default=0.1, help="a pair's similarity lies below it (%(default)s)")
    add("--near_duplicate", type=float, default=0.9, help="overlap from which replies count as the same (%(default)s)")
    add("--emotions", nargs="+", help="of the seven (all)")
    add("--history", choices=("memory", "text", "none"), help="of the prompt (memory; text for --generator)")
    add("--use_adapter", action="store_true", help="--model writes with its adapters on")
    add("--backend", choices=("transformers", "vllm"), default="transformers", help="of --generator (%(default)s)")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs that share the model under vllm (%(default)s)")
    add("--batch_size", type=int, default=32, help="prompts generated at once (%(default)s)")
    add("--chunk_size", type=int, default=64, help="samples that are resumed or divided together (%(default)s)")
    add("--max_new_tokens", type=int, default=64, help="length of a reply at most (%(default)s)")
    add("--temperature", type=float, help="of sampling (the model's generation config, else 1)")
    add("--top_p", type=float, help="samples from the likeliest tokens of so much probability (likewise, else 1)")
    add("--top_k", type=int, help="samples from so many tokens (likewise, else 0: all)")
    add("--greedy", action="store_true", help="the likeliest token each time instead of sampling")
    add("--seed", type=int, default=0, help="of sampling; each sample has a stream of its own (%(default)s)")
    add("--plain_text", action="store_true", help="prompts without clips, as strings: for trainers of text models")
    add("--device", help="cuda or cpu (a GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="of the model (%(default)s: as it was saved)")


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The options as a command line that gives them again."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    known = vars(parser.parse_args(["--model=", "--data=", "--out="]))
    line = []
    for name in known:
        value = getattr(options, name)
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *value]
        elif value is not None and value is not False:
            line.append(f"--{name}={value}")
    return line
