"""`empathic counter`: counter-emotional preference pairs."""

from empathic.commands import add_command


def run(arguments) -> int:
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


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "counter",
        run,
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
