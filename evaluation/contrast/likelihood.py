"""Log-probabilities of given replies to a prompt with a clip, for the likelihood contrast."""

import tempfile
from collections.abc import Sequence

import torch
from transformers import TrainingArguments

from ...trainers.losses import IGNORE_INDEX
from ...trainers.packed_trainer import PackedTrainer
from ...trainers.packing.shared_prefix import PackedBatch, pack_pairs
from ..systems.base import Reply
from ..systems.ours import EmpathicSystem

SUFFIX = ".likelihood"
_TEXT = ("input_ids", "attention_mask", "labels")


class ReplyScorer(PackedTrainer):
    """
    Computes log p(reply | prompt) of several replies to each prompt. A prompt, with its clip and memory, is computed
    once: its replies are packed into one row with it, as the pairs of EPO are.

    Args:
        model: an `EmpathicForConditionalGeneration`, or a PEFT model of it.
        processor: its processor.
        output_dir: scratch folder, which the trainer needs.
    """

    padded_instead = "Replies are padded, and each prompt is computed once for each reply"
    unit = "reply"

    def __init__(self, model, processor, output_dir: str):
        device = next(model.parameters()).device
        arguments = TrainingArguments(
            output_dir=output_dir, report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu"
        )
        super().__init__(model=model, args=arguments, processing_class=processor)
        model.to(device)  # the trainer may have moved it to the first GPU
        self._scored, self._processor = model.eval(), processor

    @torch.inference_mode()
    def scores(self, prepared: Sequence[dict], replies: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """
        Return (log-probability in nats, tokens) of each reply to each prompt; a reply ends with its EOS token.

        Args:
            prepared: the output of `processor.prepare` for each prompt.
            replies: the replies to each prompt.
        """
        model, processor = self._scored, self._processor
        rows, groups = [], []
        for prompt, texts in zip(prepared, replies, strict=True):
            groups.append(list(range(len(rows), len(rows) + len(texts))))
            for text in texts:
                reply = processor.encode_reply(text)
                labels = [IGNORE_INDEX] * len(prompt["input_ids"]) + reply
                rows.append({**_NO_MEDIA, "input_ids": prompt["input_ids"] + reply, "labels": labels})
        media = processor.pad(list(prepared), padding_side="right")
        inputs = {
            **processor.pad(rows, padding_side="right"),
            **{key: value for key, value in media.items() if key not in _TEXT},
        }
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        inputs["groups"] = groups
        logps, counts = self.log_probabilities(model, inputs)
        sums = [(part.sum().item(), len(part)) for part in logps.double().split(counts)]
        return [[sums[row] for row in group] for group in groups]

    def pack(self, model, inputs: dict) -> tuple[PackedBatch, dict]:
        """See `PackedTrainer`."""
        batch = pack_pairs(*(inputs[key] for key in _TEXT), groups=inputs["groups"])
        return batch, {key: value for key, value in inputs.items() if key not in (*_TEXT, "groups")}

    def padded_inputs(self, inputs: dict) -> dict:
        """See `PackedTrainer`."""
        repeats = torch.tensor([place for place, group in enumerate(inputs["groups"]) for _ in group])
        repeats = repeats.to(inputs["input_ids"].device)
        others = {key: value[repeats] for key, value in inputs.items() if key not in (*_TEXT, "groups")}
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **others}


_NO_MEDIA = {"memory_input_ids": [], "video": None, "audio": None}


class LikelihoodSystem:
    """
    A `System` that computes the log-probabilities of the `candidates` of each sample instead of replying: a row's
    `logps` are in nats, and `reply_tokens` the numbers of tokens, both in the order of the candidates.

    Args:
        system: the system whose model is used.
    """

    def __init__(self, system: EmpathicSystem):
        self.system, self.name = system, system.name + SUFFIX
        self.clip_kinds, self.batch_size = system.clip_kinds, system.batch_size
        self._scorer, self._folder = None, None

    @property
    def settings(self) -> dict:
        """See `System`."""
        return {**self.system.settings, "computes": "log-probabilities of given replies"}

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """See `System`. A sample that does not fit into the context, or has nothing to answer, has no `logps`."""
        found = [self.system.prepare_sample(sample) for sample in samples]
        rows = [place for place, (inputs, _) in enumerate(found) if inputs is not None]
        replies = [Reply("", {"note": note} if note else {}) for _, note in found]
        step = max(1, self.batch_size // max(len(sample["candidates"]) for sample in samples))
        for start in range(0, len(rows), step):
            places = rows[start : start + step]
            prepared, candidates = [found[at][0] for at in places], [samples[at]["candidates"] for at in places]
            for at, scores in zip(places, self._scores(prepared, candidates), strict=True):
                replies[at].extra |= {"logps": [score for score, _ in scores]}
                replies[at].extra |= {"reply_tokens": [count for _, count in scores]}
        return replies

    def _scores(self, prepared: list[dict], candidates: list[list[str]]) -> list[list[tuple[float, int]]]:
        if self._scorer is None:
            self._folder = tempfile.TemporaryDirectory()
            checkpoint = self.system.checkpoint
            self._scorer = ReplyScorer(checkpoint.model, checkpoint.processor, self._folder.name)
        return self._scorer.scores(prepared, candidates)
