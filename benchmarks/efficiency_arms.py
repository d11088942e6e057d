"""
Four ways ("arms") to give a language model a conversation's history, and their costs of processing a prompt (Table 3).

| arm | form of the history | cached from the previous turn |
|---|---|---|
| `text` | chat turns | nothing |
| `text_reuse` | chat turns | KV cache of the prompts' common prefix |
| `compressed` | one vector (or a few) per utterance, all encoded again (as in the paper) | nothing |
| `streaming` | the same vectors, as in `ChatSession` | state of the memory encoder, KV cache |

All arms process the same conversation up to the logits of the reply's first token, and keep the KV cache for the
following tokens.
"""

import random
import statistics
import time
from dataclasses import dataclass
from typing import cast

import torch
from transformers import CLIPImageProcessorPil, DynamicCache, PreTrainedConfig, WhisperFeatureExtractor

from ..configuration_empathic import MEM_TOKEN
from ..decoding import fork
from ..processing_empathic import EmpathicProcessor
from ..tiny.dialogues import make_dialogues
from ..tiny.language_model import prompt_texts
from ..tiny.vocabulary import build_memory_tokenizer, build_text_tokenizer
from ..trainers.checkpoints.stage_folder import load_model
from .memory_plan import LiveMemory, weight_bytes
from .shapes import build, preset_config

ARMS = ("text", "text_reuse", "compressed", "streaming")
QUERIES = 32  # vectors of a clip's audio, and of its video: the paper's number, for every preset
SLOW = 5.0  # seconds: slower runs are timed only once


def preset_parts(preset: str, dtype: torch.dtype, device: str, memory_tokens: int = 1, memory_rate: int | None = None):
    """
    Build a model with the preset's sizes and random weights, and its processor. The processor has the tokenizers of the
    tiny preset: a token is a word or a punctuation mark, roughly as for Qwen2.5's tokenizer in plain English.
    """
    tokenizer, memory_tokenizer = build_text_tokenizer(prompt_texts()), build_memory_tokenizer(prompt_texts())
    memory_tokenizer.add_special_tokens({"additional_special_tokens": [MEM_TOKEN]})
    config = preset_config(preset)
    vision, audio = cast(PreTrainedConfig, config.vision_config), cast(PreTrainedConfig, config.audio_config)
    text, memory = cast(PreTrainedConfig, config.text_config), cast(PreTrainedConfig, config.memory_config)
    size = vision.image_size
    windows = audio.max_source_positions / 50  # seconds
    processor = EmpathicProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        WhisperFeatureExtractor(feature_size=audio.num_mel_bins, chunk_length=int(windows)),
        tokenizer,
        memory_tokenizer,
        num_query_tokens=QUERIES,
        num_frames=config.num_frames,
        memory_tokens=memory_tokens,
        memory_rate=memory_rate,
    )
    config.memory_tokens, config.memory_rate = memory_tokens, memory_rate
    config.num_query_tokens = QUERIES
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    memory.vocab_size = max(memory.vocab_size, len(memory_tokenizer))
    text.eos_token_id = tokenizer.eos_token_id
    config.mem_token_id = processor.mem_token_id
    for kind in ("video", "audio", "memory"):
        token = {"video": processor.video_token, "audio": processor.audio_token, "memory": processor.memory_token}[kind]
        setattr(config, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
    return build(config, dtype, device).eval(), processor


def checkpoint_parts(path: str, dtype: torch.dtype, device: str):
    """Load the model of a checkpoint, adapters merged, and its processor."""
    model = load_model(path, dtype=dtype)
    if hasattr(model, "merge_and_unload"):  # a PEFT model
        model = model.merge_and_unload()
    return model.to(device).eval(), EmpathicProcessor.from_pretrained(path)


def make_conversation(processor: EmpathicProcessor, turns: int, tokens: int, seed: int = 0) -> list[dict]:
    """
    Make a conversation from the tiny preset's sentences. The last message is the user's turn.

    Args:
        processor: the processor whose text tokenizer counts the tokens.
        turns: number of earlier utterances.
        tokens: maximum tokens of an utterance, which has whole words only.
        seed: seed of the random choices.
    """
    sentences = [turn["text"] for dialogue in make_dialogues(200, seed=seed) for turn in dialogue]
    rng, messages = random.Random(seed), []
    for place in range(turns + 1):  # backwards from the turn, so that a longer history ends with the shorter history
        words: list[str] = []
        while len(processor.encode_plain(" ".join(words))) < tokens:
            words += rng.choice(sentences).split()
        while len(words) > 1 and len(processor.encode_plain(" ".join(words))) > tokens:
            words.pop()
        messages.append({"role": "user" if place % 2 == 0 else "assistant", "content": " ".join(words)})
    return messages[::-1]


def count_vectors(processor: EmpathicProcessor, messages: list[dict]) -> dict:
    """
    Count the memory vectors of the earlier utterances of a conversation.

    Returns:
        `vectors` per utterance, and `tokens` of text (of the language model) per vector, without roles and markers.
    """
    earlier = messages[:-1]
    vectors = sum(processor.count_memories(m["role"], m["content"]) for m in earlier)
    tokens = sum(len(processor.encode_plain(m["content"])) for m in earlier)
    return {"vectors": vectors / len(earlier), "tokens": tokens / vectors}


def with_clip(messages: list[dict], processor: EmpathicProcessor) -> list[dict]:
    """Add placeholder audio and video features to the last message, for counting positions."""
    *earlier, turn = messages
    clips = [{"type": kind, "features": torch.zeros(1, 1)} for kind in ("audio", "video")]
    return [*earlier, {**turn, "content": [*clips, {"type": "text", "text": turn["content"]}]}]


def count_positions(processor: EmpathicProcessor, messages: list[dict]) -> dict:
    """
    Count the input positions of the language model, including system prompt and template.

    Returns:
        `{"text", "memory"}`: for each form of the history, the positions of the `whole` prompt, of the prompt
        `with_media`, and of the `history`: the whole prompt minus the prompt of the same turn without a history.
    """
    counts = {}
    for history in ("text", "memory"):
        whole, media, alone = (
            len(processor.prepare(conversation, history=history)["input_ids"])
            for conversation in (messages, with_clip(messages, processor), messages[-1:])
        )
        counts[history] = {"whole": whole, "with_media": media, "history": whole - alone}
    return counts


def shared(first: list[int], second: list[int]) -> int:
    """Length of the common prefix, excluding the last position of `second`, which must be run for its logits."""
    pairs = zip(first, second[:-1], strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second) - 1))


@dataclass
class Arm:
    """
    An arm, prepared for a conversation.

    Attributes:
        prompt: token ids of the whole prompt.
        new_positions: number of positions that the language model processes.
        memory_tokens: number of tokens that the memory encoder processes.
        held: tensors cached from the previous turn.
        run: function that processes the prompt; takes `logits_to_keep` (1: last position, 0: all processed positions)
            and returns the logits.
    """

    prompt: list[int]
    new_positions: int
    memory_tokens: int
    held: list[torch.Tensor]
    run: object


@torch.inference_mode()
def prepare_arms(model, processor: EmpathicProcessor, messages: list[dict]) -> dict[str, Arm]:
    """
    Prepare the four arms for a conversation.

    The cached tensors come from the previous turn, whose sentence and reply are the last two utterances of the history.
    """
    device, config = model.device, model.config
    text_ids = processor.prepare(messages, history="text")["input_ids"]
    given = processor.prepare(messages)
    ids, memory_ids = given["input_ids"], given["memory_input_ids"]
    before = messages[:-2] if len(messages) > 2 else None  # the conversation up to the previous turn

    def tensor(row: list[int]) -> torch.Tensor:
        return torch.tensor([row], device=device)

    def fill(row: list[int], keep: int, **memory) -> DynamicCache:
        cache = DynamicCache(config=config.text_config)
        if keep:
            model(input_ids=tensor(row[:keep]), cache=cache, logits_to_keep=1, **memory)
        return cache

    def layers(cache: DynamicCache) -> list[torch.Tensor]:
        return [part for layer in cache.layers if layer.is_initialized for part in (layer.keys, layer.values)]

    text, text_keep = tensor(text_ids), 0
    if before is not None:
        text_before = processor.prepare(before, history="text")["input_ids"]
        text_keep = shared(text_before, text_ids)
    text_cache, text_new = fill(text_ids, text_keep), tensor(text_ids[text_keep:])

    whole, memory = tensor(ids), tensor(memory_ids)
    state, keep, known = model.new_memory_state(), 0, 0
    kept_vectors = {}
    if before is not None:
        earlier = processor.prepare(before)
        keep, known = shared(earlier["input_ids"], ids), len(earlier["memory_input_ids"])
        if known:
            kept_vectors = {"memory_vectors": model.append_to_memory(state, memory[:, :known])[None]}
    cache, new, unread = fill(ids, keep, **kept_vectors), tensor(ids[keep:]), memory[:, known:].clone()

    def run_text(logits_to_keep: int) -> torch.Tensor:
        return model(input_ids=text, use_cache=True, logits_to_keep=logits_to_keep).logits

    def run_text_reuse(logits_to_keep: int) -> torch.Tensor:
        past = fork(text_cache, text_keep)
        return model(input_ids=text_new, cache=past, logits_to_keep=logits_to_keep).logits

    def run_compressed(logits_to_keep: int) -> torch.Tensor:
        return model(input_ids=whole, memory_input_ids=memory, use_cache=True, logits_to_keep=logits_to_keep).logits

    def run_streaming(logits_to_keep: int) -> torch.Tensor:
        vectors = model.append_to_memory(state.fork(), unread)[None]
        past = fork(cache, keep)
        return model(input_ids=new, memory_vectors=vectors, cache=past, logits_to_keep=logits_to_keep).logits

    return {
        "text": Arm(text_ids, len(text_ids), 0, [text], run_text),
        "text_reuse": Arm(text_ids, text_new.shape[1], 0, [text_new, *layers(text_cache)], run_text_reuse),
        "compressed": Arm(ids, len(ids), memory.shape[1], [whole, memory], run_compressed),
        "streaming": Arm(
            ids,
            new.shape[1],
            unread.shape[1],
            [new, unread, state.conv, state.ssm, *layers(cache)],
            run_streaming,
        ),
    }


class CostMeter:
    """Measures time and memory: CPU time and live tensors on a CPU, CUDA events and CUDA's allocator on a GPU."""

    def __init__(self, model):
        self.weights = [*model.parameters(), *model.buffers()]
        self.is_cuda = model.device.type == "cuda"
        self.weight_bytes = weight_bytes(model)

    def seconds(self, run) -> float:
        """Measure the time of a call."""
        if not self.is_cuda:
            start = time.process_time()
            run()
            return time.process_time() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def peak(self, run, held: list[torch.Tensor]) -> int:
        """Measure the peak bytes during a call, without the weights but with the cached tensors."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            kept = sum(tensor.untyped_storage().nbytes() for tensor in held)
            before = torch.cuda.memory_allocated()  # includes the tensors of other arms
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before + kept
        with LiveMemory([*self.weights, *held]) as live:
            run()
        return live.peak - self.weight_bytes

    def alternate(self, runs: dict, repeats: int) -> dict[str, float]:
        """Measure median seconds, alternating between the runs after a first round; slow runs are timed only once."""
        first = {name: self.seconds(run) for name, run in runs.items()}
        taken = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                if first[name] < SLOW:
                    taken[name].append(self.seconds(run))
        return {name: statistics.median(values or [first[name]]) for name, values in taken.items()}


@torch.inference_mode()
def measure_arms(model, processor: EmpathicProcessor, messages: list[dict], repeats: int) -> dict:
    """
    Measure the costs of each arm for a conversation.

    Returns:
        {arm: `positions` (of the prompt), `new_positions`, `memory_tokens`, `seconds`, and the peak bytes without the
        weights, `peak_bytes` (logits of the last position) and `peak_bytes_all_logits`; both include the `kept_bytes`
        that were cached before the run}.
    """
    arms, meter = prepare_arms(model, processor, messages), CostMeter(model)
    seconds = meter.alternate({name: lambda arm=arm: arm.run(1) for name, arm in arms.items()}, repeats)
    return {
        name: {
            "positions": len(arm.prompt),
            "new_positions": arm.new_positions,
            "memory_tokens": arm.memory_tokens,
            "seconds": seconds[name],
            "peak_bytes": meter.peak(lambda arm=arm: arm.run(1), arm.held),
            "peak_bytes_all_logits": meter.peak(lambda arm=arm: arm.run(0), arm.held),
            "kept_bytes": sum(tensor.untyped_storage().nbytes() for tensor in arm.held),
        }
        for name, arm in arms.items()
    }
