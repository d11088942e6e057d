"""Pretrains the tiny preset's language model: a Qwen2 of under a million parameters that stands in for Qwen2.5.

The later stages keep the LLM frozen (or nearly), so it must already be able to do what every pretrained LLM can: copy
words, follow the prompts, and read word-like vectors that stand in a prompt in the place of tokens. Plain language
modelling of a few thousand dialogues teaches none of these in a few minutes. So each step mixes small tasks in the
exact format of the chat templates (`pretraining_tasks`), with the loss on the answers only, and the weights start with
heads that copy (`start_with_copying`).

The vectors of the tasks are made from the model's own embeddings (`utterance_vectors`): no memory or clip encoder is
involved. Those learn later to write such vectors for this model.
"""

import math
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from empathic.tiny.pretraining_tasks import PretrainingTasks, PromptWriter, memory_line, prompt_texts

__all__ = ["pretrain_language_model", "prompt_texts", "tiny_text_config"]

ORDER_SHARE = 0.5  # how strongly the word before colours a word in a vector, against the word itself
VECTOR_NOISE = 0.3  # of the vectors' norm: what an encoder writes later will never be exact
CUE_NOISE = 0.5
MIN_WORD_WEIGHT = 0.25
RARE = 1 / 200  # a word in fewer utterances than this has the full weight


def tiny_text_config(tokenizer, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384):
    """The config of the tiny Qwen2 for this tokenizer, with Qwen2.5's rotary base."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def start_with_copying(model, vector_id, heads=2, seed=0):
    """Initial weights with which two layers copy: an induction circuit (Olsson et al. 2022), written down instead of
    found. From random weights it takes longer to appear than the whole pretraining may last.

    - Word vectors are random and large (norm about the square root of the width), so that what later layers add does
      not drown them and training does not draw them together; the final norm starts small to keep the logits modest.
    - In layer 0, `heads` heads look at the token before, through biases that the rotary embedding turns by one step,
      and add a projection of that token to the stream.
    - In layer 1, as many heads look for the place whose previous token is the current one, and add its token.
    - The other heads of layer 1, and as many of layer 2, look at the memory vectors and add what is in them.

    All of it is trained on like any other weight.

    Args:
        model: `Qwen2ForCausalLM` of at least 3 layers.
        vector_id: the placeholder of the memory vectors, whose embedding marks them.
        heads: how many of each kind.
        seed: of the random directions.
    """
    config = model.config
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)

    def orthogonal():
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    model.get_input_embeddings().weight.normal_(generator=generator)
    model.model.norm.weight.fill_(0.1)
    theta = config.rope_parameters["rope_theta"]
    angles = theta ** (-torch.arange(size // 2) / (size // 2))  # radians a step
    fast, strength = 5, 8.0
    turned_by_one = torch.zeros(size)
    turned_by_one[:fast] = angles[:fast].cos()
    turned_by_one[size // 2 :][:fast] = angles[:fast].sin()
    straight = torch.zeros(size)
    straight[:fast] = 1
    slow = torch.ones(size, 1)
    slow[:3] = slow[size // 2 :][:3] = 0  # content is compared where rotation over a prompt is small
    read, write, copy, tell = (orthogonal() for _ in range(4))
    first, second, third = (model.model.layers[i].self_attn for i in (0, 1, 2))
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        first.q_proj.weight[rows] *= 0.1
        first.k_proj.weight[rows] *= 0.1
        first.q_proj.bias[rows] = strength * straight
        first.k_proj.bias[rows] = strength * turned_by_one
        first.v_proj.weight[rows] = 0.9 * read[rows]
        first.o_proj.weight[:, rows] = write[:, rows]
        second.q_proj.weight[rows] = 3 * slow * read[rows]
        second.k_proj.weight[rows] = 3 * slow * write[:, rows].T
        second.v_proj.weight[rows] = copy[rows]
        second.o_proj.weight[:, rows] = 4 * copy[rows].T
    marker = F.normalize(model.get_input_embeddings().weight[vector_id], dim=0)
    still = torch.zeros(size)
    still[8 : size // 2] = still[size // 2 + 8 :] = 1
    still = F.normalize(still, dim=0) * 6**0.5
    places = [(second, head) for head in range(heads, config.num_attention_heads)] + [(third, h) for h in range(heads)]
    for i, (layer, head) in enumerate(places):
        rows, part = slice(head * size, (head + 1) * size), slice(i * size, (i + 1) * size)
        layer.q_proj.weight[rows] *= 0.3
        layer.q_proj.bias[rows] = still
        layer.k_proj.weight[rows] = 0.3 * layer.k_proj.weight[rows] + still[:, None] * marker
        layer.v_proj.weight[rows] = tell[part]
        layer.o_proj.weight[:, rows] = 3 * tell[part].T


def word_weights(writer, dialogues):
    """How much each token counts in an utterance's vector (vocabulary,): rare ones 1, the commonest MIN_WORD_WEIGHT.

    Eight of ten words of an utterance are common ones that the grammar gives anyway.
    """
    lines = [memory_line(turn) for dialogue in dialogues for turn in dialogue]
    counts = Counter(token for line in lines for token in set(writer.encode(line)))
    weights = torch.ones(len(writer.tokenizer))
    for token, count in counts.items():
        weights[token] = min(1.0, max(MIN_WORD_WEIGHT, math.log(count / len(lines)) / math.log(RARE)))
    return weights


def utterance_vectors(embeddings, utterances, weights, start_id):
    """One vector an utterance, of the norm 1: the weighted sum of its words' embeddings, each with the word before.

    A plain sum carries no word order, so a second copy of each word is added with the signs of the embedding of the
    word before (of `start_id` for the first). Whoever knows the word before can take the signs off again.

    Args:
        embeddings: (vocabulary, hidden).
        utterances: sequences of token ids.
        weights: (vocabulary,), of `word_weights`.

    Returns:
        (utterances, hidden)
    """
    length = max(map(len, utterances))
    ids = torch.tensor([[*utterance, *[-1] * (length - len(utterance))] for utterance in utterances])
    real, ids = ids >= 0, ids.clamp(min=0)
    before = torch.cat([torch.full((len(ids), 1), start_id), ids[:, :-1]], dim=1)
    signs = embeddings.detach()[before].sign()  # (utterances, length, hidden)
    words = embeddings[ids] * (weights[ids] * real)[..., None]
    return F.normalize((words * (1 + ORDER_SHARE * signs)).sum(1), dim=-1)


def _blur(vectors, noise):
    """Vectors (n, hidden) of norm 1 with noise of about the norm `noise` added, at norm 1 again."""
    return F.normalize(vectors + noise * torch.randn_like(vectors) / vectors.shape[-1] ** 0.5, dim=-1)


def _common_length(prompts, holders):
    """How many tokens all prompts share at their start, none of them a placeholder, and not the whole of a prompt."""
    limit = min(map(len, prompts)) - 1
    ends = (i for i in range(limit) if prompts[0][i] in holders or len({prompt[i] for prompt in prompts}) > 1)
    return next(ends, limit)


class Pretrainer:
    """The loss of samples of one task.

    Args:
        model: `Qwen2ForCausalLM`.
        writer: the `PromptWriter`.
        weights: of `word_weights`.
    """

    def __init__(self, model, writer, weights):
        self.model = model
        self.writer = writer
        self.weights = weights
        self.start_id = writer.encode("\n")[0]

    def _placed(self, vectors, kind, scale):
        """Vectors (n, hidden) of norm 1 as they stand in a prompt: at the size of word embeddings, and recognisable by
        the embedding of their placeholder, as an encoder's bias can make them."""
        holder = self.model.get_input_embeddings().weight[self.writer.placeholder_ids[kind]]
        return scale * vectors + holder

    def inputs(self, samples):
        """Right-padded `inputs_embeds` (batch, length, hidden), `attention_mask` and `labels` (batch, length)."""
        rows = [sample["prompt"] + sample["answer"] for sample in samples]
        length = max(map(len, rows))
        pad_id = self.writer.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for i, sample in enumerate(samples):
            labels[i, len(sample["prompt"]) : len(rows[i])] = torch.tensor(sample["answer"])
        table, holders = self.model.get_input_embeddings().weight, self.writer.placeholder_ids
        scale = table.detach().norm(dim=-1).median()
        embeds = table[ids]
        utterances = [utterance for sample in samples for utterance in sample["utterances"]]
        if utterances:
            vectors = _blur(utterance_vectors(table, utterances, self.weights, self.start_id), VECTOR_NOISE)
            here = (ids == holders["memory"])[..., None]
            embeds = embeds.masked_scatter(here, self._placed(vectors, "memory", scale))
        cues = [cue for sample in samples for cue in sample["cues"]]
        if cues:
            vectors = _blur(F.normalize(table[torch.tensor(cues)].sum(1), dim=-1), CUE_NOISE)
            here = (ids == holders["audio"]) | (ids == holders["video"])
            embeds = embeds.masked_scatter(here[..., None], self._placed(vectors, "audio", scale))
        return embeds, mask, labels

    def loss_sum(self, samples):
        """The summed cross entropy of the answers' tokens (nats).

        The tokens that all prompts begin with are computed once.
        """
        embeds, mask, labels = self.inputs(samples)
        shared = _common_length([sample["prompt"] for sample in samples], set(self.writer.placeholder_ids.values()))
        past = self.model.model(inputs_embeds=embeds[:1, :shared], use_cache=True).past_key_values
        past.batch_repeat_interleave(len(samples))
        outputs = self.model.model(inputs_embeds=embeds[:, shared:], attention_mask=mask, past_key_values=past)
        hidden, labels = outputs.last_hidden_state[:, :-1], labels[:, shared + 1 :]
        chosen = labels != -100
        logits = self.model.lm_head(hidden[chosen])  # (answer tokens, vocabulary)
        return F.cross_entropy(logits, labels[chosen], reduction="sum")


def pretrain_language_model(
    tokenizer,
    dialogues,
    output_dir,
    steps=900,
    batch_size=24,
    learning_rate=5e-3,
    seed=0,
    num_query_tokens=4,
    config=None,
    progress=True,
):
    """Pretrains the tiny language model and saves it with its tokenizer as an ordinary Hugging Face folder.

    Args:
        tokenizer: of `build_text_tokenizer(prompt_texts())`.
        dialogues: training conversations of `make_dialogues`.
        output_dir: where to save.
        steps: optimiser steps; the learning rate decays linearly to zero.
        batch_size: samples a step.
        seed: of the weights and of the draws.
        num_query_tokens: placeholders of the voice, and of the face.
        config: `Qwen2Config`; `tiny_text_config(tokenizer)` by default.

    Returns:
        The loss of each step, a list of floats (nats a token).
    """
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_text_config(tokenizer) if config is None else config)
    writer = PromptWriter(tokenizer, num_query_tokens)
    start_with_copying(model, writer.placeholder_ids["memory"], seed=seed)
    tasks = PretrainingTasks(writer, dialogues, seed)
    pretrainer = Pretrainer(model, writer, word_weights(writer, dialogues))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = 15
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    model.train()
    losses = []
    bar = tqdm(range(steps), desc="language model", disable=not progress)
    for step in bar:
        groups = tasks.batch(step, batch_size)
        count = sum(len(sample["answer"]) for samples in groups for sample in samples)
        total = 0.0
        for samples in groups:
            loss = pretrainer.loss_sum(samples) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    model.eval()
    output_dir = Path(output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return losses
