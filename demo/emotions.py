"""The emotion of a turn, as the probabilities of the seven."""

import torch

from empathic.configuration_empathic import EMOTIONS


@torch.inference_mode()
def name_emotion(model, processor, text: str, clips: dict[str, dict]) -> dict[str, float] | None:
    """
    The model's probabilities of the seven emotions as its answer to the `emotion` task (paper's Sec. 3.1), which sum
    to 1. The conversation before is no part of that task.

    Args:
        model, processor: a model and its `EmpathicProcessor`.
        text: what was said; read only by a model that was trained with the sentence.
        clips: decoded content items by kind, `audio` and `video`.

    Returns:
        the probabilities by emotion; None where the task would show the model nothing.
    """
    content = [{"type": kind, **clip} for kind, clip in clips.items()]
    if text and processor.with_text:
        content.append({"type": "text", "text": text})
    if not content:
        return None
    inputs = processor.pad([processor.prepare([{"role": "user", "content": content}], task="emotion")])
    inputs = inputs.to(model.device)
    prompt = model(**inputs, use_cache=True)
    # The prompt is read once; the seven answers go on from its keys and values.
    answers = [processor.encode_reply(emotion) for emotion in EMOTIONS]
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(len(answers))
    longest = max(map(len, answers))
    ids = torch.tensor([[*answer, *[answer[-1]] * (longest - len(answer))] for answer in answers], device=model.device)
    there = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=model.device)
    mask = torch.cat([inputs["attention_mask"].expand(len(answers), -1), there[:, :-1]], dim=1)
    later = model(input_ids=ids[:, :-1], attention_mask=mask, past_key_values=cache).logits
    logits = torch.cat([prompt.logits[:, -1:].expand(len(answers), -1, -1), later], dim=1).float()
    scores = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    probabilities = (scores * there).sum(1).softmax(0).tolist()
    return dict(zip(EMOTIONS, probabilities, strict=True))
