"""Emotion recognition for a turn: the probabilities of the seven emotions."""

import torch

from .compat_empathic import CACHE
from .configuration_empathic import EMOTIONS


@torch.inference_mode()
def name_emotion(model, processor, text: str, clips: dict[str, dict]) -> dict[str, float] | None:
    """
    Compute the model's probabilities of the seven emotions as answers to the `emotion` task (paper's Sec. 3.1),
    normalized to sum to 1. The history is not part of this task.

    Args:
        model, processor: a model and its `EmpathicProcessor`.
        text: text of the turn; used only if the model was trained with the sentence.
        clips: content items by kind, `audio` and `video`: decoded, or with the `features` of their encoder.

    Returns:
        the probability of each emotion; None if the model would get no input.
    """
    content = [{"type": kind, **clip} for kind, clip in clips.items()]
    if text and processor.with_text:
        content.append({"type": "text", "text": text})
    if not content:
        return None
    inputs = processor.pad([processor.prepare([{"role": "user", "content": content}], task="emotion")])
    inputs = inputs.to(model.device)
    prompt = model(**inputs, use_cache=True)
    # Encode the prompt once; all seven answers continue from its KV cache.
    answers = [processor.encode_reply(emotion) for emotion in EMOTIONS]
    cache = prompt[CACHE]
    cache.batch_repeat_interleave(len(answers))
    longest = max(map(len, answers))
    ids = torch.tensor([[*answer, *[answer[-1]] * (longest - len(answer))] for answer in answers], device=model.device)
    there = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=model.device)
    mask = torch.cat([inputs["attention_mask"].expand(len(answers), -1), there[:, :-1]], dim=1)
    later = model(input_ids=ids[:, :-1], attention_mask=mask, cache=cache).logits
    logits = torch.cat([prompt.logits[:, -1:].expand(len(answers), -1, -1), later], dim=1).float()
    scores = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    probabilities = (scores * there).sum(1).softmax(0).tolist()
    return dict(zip(EMOTIONS, probabilities, strict=True))
