"""Stage `emotion` with a linear head in place of its language model, for quick comparisons of options."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, get_cosine_schedule_with_warmup, set_seed

from ..configuration_empathic import EMOTIONS

BATCH = 64  # clips at a time in evaluation


class QformerClassifier(nn.Module):
    """Classifies clips by the mean of the Q-former's output vectors. `script`: the options of the stage."""

    def __init__(self, script, width: int):
        super().__init__()
        config = Blip2QFormerConfig(
            num_hidden_layers=script.qformer_layers,
            num_attention_heads=script.qformer_heads,
            hidden_size=script.qformer_width,
            intermediate_size=4 * script.qformer_width,
            hidden_dropout_prob=script.qformer_dropout,
            attention_probs_dropout_prob=script.qformer_dropout,
            initializer_range=script.qformer_init,
            encoder_hidden_size=width,
        )
        self.qformer = Blip2QFormerModel._from_config(config)
        self.queries = nn.Parameter(torch.randn(script.num_query_tokens, config.hidden_size) * script.qformer_init)
        self.head = nn.Linear(config.hidden_size, len(EMOTIONS))

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return logits (clips, emotions) from features (clips, positions, width) and a mask (clips, positions)."""
        queries = self.queries.expand(len(features), -1, -1)
        hidden = self.qformer(
            query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=mask.long()
        ).last_hidden_state
        return self.head(hidden.mean(1))


def average_positions(features: torch.Tensor, number: int) -> torch.Tensor:
    """Average each `number` successive positions of a clip (positions, width); the last group may be smaller."""
    return torch.stack([group.float().mean(0) for group in features.split(number)])


def pad(clips: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad clips (positions, width) to a batch (clips, longest, width), with its mask (clips, longest)."""
    lengths = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def standardized(clips: list[torch.Tensor], train: np.ndarray) -> list[torch.Tensor]:
    """Standardize all clips with the mean and the deviation of the means of the training clips, per channel."""
    means = torch.stack([clips[place].mean(0) for place in train])
    return [(clip - means.mean(0)) / means.std(0) for clip in clips]


def train_classifier(
    clips: list[torch.Tensor], emotions: np.ndarray, place: dict[str, np.ndarray], script, args, seed: int
) -> dict:
    """
    Train on one fold and test it.

    Args:
        clips: the encoder's outputs of each clip, (positions, width).
        emotions: the class of each clip.
        place: the clips of each split.
        script, args: the options of the stage, as `train.parse` gives them.

    Returns:
        The result as that of the stage: `train_loss`, `seconds` of training, accuracy on `validation` and `test`,
        `hits` on the test clips.
    """
    set_seed(seed)
    rng, train = np.random.default_rng([seed, 0]), place["train"]
    if script.standardize_features:
        clips = standardized(clips, train)
    labels = torch.from_numpy(emotions)
    model, size = QformerClassifier(script, clips[0].shape[1]), args.per_device_train_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.get_warmup_steps(args.max_steps), args.max_steps)
    passes = -(-args.max_steps * size // len(train))
    order = np.concatenate([rng.permutation(train) for _ in range(passes)])
    losses, started = [], time.monotonic()
    for step in range(args.max_steps):
        chosen = order[step * size : (step + 1) * size]
        loss = F.cross_entropy(model(*pad([clips[number] for number in chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.monotonic() - started
    model.eval()
    hits: dict[str, list[int]] = {}
    with torch.no_grad():
        for split in ("validation", "test"):
            hits[split] = []
            for start in range(0, len(place[split]), BATCH):
                chosen = place[split][start : start + BATCH]
                right = model(*pad([clips[number] for number in chosen])).argmax(1) == labels[chosen]
                hits[split] += right.int().tolist()
    return {
        "train_loss": float(np.mean(losses)),
        "seconds": seconds,
        "validation": float(np.mean(hits["validation"])),
        "test": float(np.mean(hits["test"])),
        "hits": hits["test"],
    }
