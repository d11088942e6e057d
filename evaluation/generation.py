"""Greedy answers of the model to many conversations, in batches."""

import torch
from tqdm import tqdm


@torch.no_grad()
def generate_texts(
    model,
    processor,
    conversations: list[list[dict]],
    task: str = "dialogue",
    history: str = "memory",
    max_new_tokens: int = 64,
    batch_size: int = 32,
    description: str | None = None,
    **generate_kwargs,
) -> list[str]:
    """
    The model's answer to each conversation, in order.

    Args:
        model, processor: the model and its `EmpathicProcessor`.
        conversations: message lists.
        task, history: as in `EmpathicProcessor.apply_chat_template`.
        max_new_tokens, batch_size: tokens of an answer at most, and conversations generated at once.
        description: of the progress bar; none without it.
        generate_kwargs: of `model.generate`; greedy by default.
    """
    model.eval()
    texts = []
    for start in tqdm(range(0, len(conversations), batch_size), desc=description, disable=description is None):
        inputs = processor.apply_chat_template(
            conversations[start : start + batch_size],
            task=task,
            history=history,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs})
        replies = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [reply.strip() for reply in replies]
    return texts
