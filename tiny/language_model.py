"""Pretrain the tiny preset's language model: a Qwen2 with under a million parameters, the stand-in for Qwen2.5.

The later stages keep the LLM frozen (or train only LoRA), so it must already have the skills of a pretrained LLM: copy
words, follow the prompts, and read vectors in a prompt that replace tokens. Plain language modeling of a few thousand
dialogues teaches none of these in a few minutes. So each step mixes small tasks in the exact format of the chat
templates (`pretraining_tasks`), with the loss on the answers only, and the initial weights have heads that copy
(`start_with_copying`).

The vectors of the tasks come from the model's own embeddings (`utterance_vectors`), without a memory or clip encoder.
The encoders learn later to produce such vectors for this model.
"""

import json
import math
import signal
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from ..compat_empathic import CACHE
from ..processes import end_with_launcher
from .pretraining_tasks import PretrainingTasks, PromptWriter, memory_line, prompt_texts

__all__ = ["pretrain_language_model", "prompt_texts", "tiny_text_config"]

ORDER_SHARE = 0.5  # weight of a word's part that encodes the preceding word, relative to the word itself
VECTOR_NOISE = 0.3  # share of the vectors' norm, because the encoders' vectors are never exact
CUE_NOISE = 0.5
MIN_WORD_WEIGHT = 0.25
RARE = 1 / 200  # words in a smaller share of the utterances have full weight


def tiny_text_config(tokenizer, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384):
    """Return the config of the tiny Qwen2 for this tokenizer, with Qwen2.5's rotary base."""
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
    """Initialize two layers with an induction circuit (Olsson et al. 2022), so that they copy. From random weights the
    circuit would take longer to emerge than the whole pretraining.

    - Word vectors are random and large (norm about the square root of the width), so that the outputs of later layers
      do not dominate them and training does not make them similar; the final norm starts small to keep logits moderate.
    - In layer 0, `heads` heads attend to the previous token, through biases that the rotary embedding rotates by one
      position, and add a projection of this token to the residual stream.
    - In layer 1, as many heads attend to the position after an earlier occurrence of the current token, and add the
      token at this position.
    - The other heads of layer 1, and `heads` heads of layer 2, attend to the memory vectors and add their content.

    These weights are then trained like all other weights.

    Args:
        model: `Qwen2ForCausalLM` with at least 3 layers.
        vector_id: id of the placeholder of the memory vectors, whose embedding marks the vectors.
        heads: number of heads of each kind.
        seed: seed of the random directions.
    """
    config = model.config
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)

    def orthogonal():
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    model.get_input_embeddings().weight.normal_(generator=generator)
    model.model.norm.weight.fill_(0.1)
    theta = config.rope_parameters["rope_theta"]
    angles = theta ** (-torch.arange(size // 2) / (size // 2))  # radians per position
    fast, strength = 5, 8.0
    turned_by_one = torch.zeros(size)
    turned_by_one[:fast] = angles[:fast].cos()
    turned_by_one[size // 2 :][:fast] = angles[:fast].sin()
    straight = torch.zeros(size)
    straight[:fast] = 1
    slow = torch.ones(size, 1)
    slow[:3] = slow[size // 2 :][:3] = 0  # compare content in dimensions that rotate little over a prompt
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
    """Return each token's weight in an utterance's vector (vocabulary,): 1 for rare tokens, down to MIN_WORD_WEIGHT.

    About 80% of the words of an utterance are common words, which the model can infer from the grammar.
    """
    lines = [memory_line(turn) for dialogue in dialogues for turn in dialogue]
    counts = Counter(token for line in lines for token in set(writer.encode(line)))
    weights = torch.ones(len(writer.tokenizer))
    for token, count in counts.items():
        weights[token] = min(1.0, max(MIN_WORD_WEIGHT, math.log(count / len(lines)) / math.log(RARE)))
    return weights


def utterance_vectors(embeddings, utterances, weights, starts):
    """Return a vector of norm 1 per utterance: the weighted sum of its words' embeddings, combined with word order.

    A plain sum has no word order, so a second copy of each word's embedding is added, multiplied by the signs of the
    preceding word's embedding. A model that knows the preceding word can undo the signs.

    Args:
        embeddings: (vocabulary, hidden).
        utterances: sequences of token ids.
        weights: (vocabulary,), from `word_weights`.
        starts: the token id before the first word of each utterance.

    Returns:
        (utterances, hidden)
    """
    length = max(map(len, utterances))
    ids = torch.tensor([[*utterance, *[-1] * (length - len(utterance))] for utterance in utterances])
    real, ids = ids >= 0, ids.clamp(min=0)
    before = torch.cat([torch.tensor(starts)[:, None], ids[:, :-1]], dim=1)
    signs = embeddings.detach()[before].sign()  # (utterances, length, hidden)
    words = embeddings[ids] * (weights[ids] * real)[..., None]
    return F.normalize((words * (1 + ORDER_SHARE * signs)).sum(1), dim=-1)


def _blur(vectors, noise):
    """Add noise with a norm of about `noise` to vectors (n, hidden) of norm 1, and normalize again."""
    return F.normalize(vectors + noise * torch.randn_like(vectors) / vectors.shape[-1] ** 0.5, dim=-1)


def _common_length(prompts, holders):
    """Length of the prompts' common prefix, which has no placeholder and is shorter than every prompt."""
    limit = min(map(len, prompts)) - 1
    ends = (i for i in range(limit) if prompts[0][i] in holders or len({prompt[i] for prompt in prompts}) > 1)
    return next(ends, limit)


class Pretrainer:
    """Computes the loss of samples of one task.

    Args:
        model: `Qwen2ForCausalLM`.
        writer: `PromptWriter`.
        weights: result of `word_weights`.
    """

    def __init__(self, model, writer, weights):
        self.model = model
        self.writer = writer
        self.weights = weights
        self.start_id = writer.encode("\n")[0]

    def _placed(self, vectors, kind, scale):
        """Scale vectors (n, hidden) of norm 1 to the norm of word embeddings, and add the embedding of their
        placeholder, which marks them. An encoder can learn such a marker in its bias."""
        holder = self.model.get_input_embeddings().weight[self.writer.placeholder_ids[kind]]
        return scale * vectors + holder

    def inputs(self, samples):
        """Build right-padded `inputs_embeds` (batch, length, hidden), `attention_mask` and `labels` (batch, length)."""
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
            before, words = zip(*utterances, strict=True)
            starts = [self.start_id if token is None else token for token in before]
            vectors = _blur(utterance_vectors(table, words, self.weights, starts), VECTOR_NOISE)
            here = (ids == holders["memory"])[..., None]
            embeds = embeds.masked_scatter(here, self._placed(vectors, "memory", scale))
        cues = [cue for sample in samples for cue in sample["cues"]]
        if cues:
            vectors = _blur(F.normalize(table[torch.tensor(cues)].sum(1), dim=-1), CUE_NOISE)
            here = (ids == holders["audio"]) | (ids == holders["video"])
            embeds = embeds.masked_scatter(here[..., None], self._placed(vectors, "audio", scale))
        return embeds, mask, labels

    def loss_sum(self, samples):
        """Return the summed cross entropy of the answers' tokens (nats).

        The prompts' common prefix is computed once.
        """
        embeds, mask, labels = self.inputs(samples)
        shared = _common_length([sample["prompt"] for sample in samples], set(self.writer.placeholder_ids.values()))
        past = self.model.model(inputs_embeds=embeds[:1, :shared], use_cache=True)[CACHE]
        past.batch_repeat_interleave(len(samples))
        outputs = self.model.model(inputs_embeds=embeds[:, shared:], attention_mask=mask, **{CACHE: past})
        hidden, labels = outputs.last_hidden_state[:, :-1], labels[:, shared + 1 :]
        chosen = labels != -100
        logits = self.model.lm_head(hidden[chosen])  # (answer tokens, vocabulary)
        return F.cross_entropy(logits, labels[chosen], reduction="sum")


def _share(groups, rank, processes):
    """Return the groups of samples that a process computes, so that all have about as many tokens."""
    loads, own = [0] * processes, []
    sizes = [sum(len(sample["prompt"]) + len(sample["answer"]) for sample in samples) for samples in groups]
    for size, samples in sorted(zip(sizes, groups, strict=True), key=lambda pair: -pair[0]):
        chosen = loads.index(min(loads))
        loads[chosen] += size
        if chosen == rank:
            own.append(samples)
    return own


def _add_over_processes(model, total):
    """Sum the gradients, and a loss, over the processes; return the loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([torch.tensor([total]), *[gradient.flatten() for gradient in gradients]])
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for parameter, gradient in zip(parameters, flat[1:].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    return flat[0].item()


def _pretrain(rank, processes, folder, tokenizer, dialogues, options):
    """What each process of `pretrain_language_model` does. The first writes the model to `folder` and its losses to
    `losses.json` beside it."""
    if processes > 1:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one gets it too
        end_with_launcher()
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder.parent / "store"), processes)  # a `file://` address needs an absolute path
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    seed, steps, config = options["seed"], options["steps"], options["config"]
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_text_config(tokenizer) if config is None else config)
    writer = PromptWriter(tokenizer, options["num_query_tokens"])
    start_with_copying(model, writer.placeholder_ids["memory"], seed=seed)
    tasks = PretrainingTasks(writer, dialogues, seed, options["most_vectors"])
    pretrainer = Pretrainer(model, writer, word_weights(writer, dialogues))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = 15
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    model.train()
    losses = []
    bar = tqdm(range(steps), desc="language model", disable=rank > 0 or not options["progress"])
    for step in bar:
        groups = tasks.batch(step, options["batch_size"])
        count = sum(len(sample["answer"]) for samples in groups for sample in samples)
        total = 0.0
        for samples in _share(groups, rank, processes):
            loss = pretrainer.loss_sum(samples) / count
            loss.backward()
            total += loss.item()
        if processes > 1:
            total = _add_over_processes(model, total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    if rank == 0:
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder.parent / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


def pretrain_language_model(
    tokenizer,
    dialogues,
    output_dir,
    steps=1200,
    batch_size=24,
    learning_rate=5e-3,
    seed=0,
    num_query_tokens=4,
    config=None,
    progress=True,
    processes=1,
    most_vectors=1,
):
    """Pretrain the tiny language model and save it with its tokenizer as an ordinary Hugging Face folder.

    Args:
        tokenizer: result of `build_text_tokenizer(prompt_texts())`.
        dialogues: training conversations from `make_dialogues`.
        output_dir: folder to write.
        steps: optimizer steps; the learning rate decays linearly to zero.
        batch_size: samples per step.
        seed: seed of the weights and of the samples.
        num_query_tokens: number of placeholders for the voice, and for the face.
        config: `Qwen2Config`; `tiny_text_config(tokenizer)` by default.
        processes: processes of one thread each that divide the tasks of a step.
        most_vectors: maximum number of vectors for an utterance, see `PretrainingTasks`.

    Returns:
        The loss of each step, a list of floats (nats per token).
    """
    options = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
        "num_query_tokens": num_query_tokens, "config": config, "progress": progress, "most_vectors": most_vectors,
    }  # fmt: skip
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir.parent) as folder:
        model = Path(folder) / "model"
        arguments = (processes, model, tokenizer, dialogues, options)
        if processes == 1:
            _pretrain(0, *arguments)
        else:
            mp.spawn(_pretrain, arguments, nprocs=processes)
        output_dir.mkdir(exist_ok=True)
        for file in model.iterdir():
            file.replace(output_dir / file.name)
        return json.loads((model.parent / "losses.json").read_text(encoding="utf-8"))
