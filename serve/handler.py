"""
A custom handler for Hugging Face Inference Endpoints: `empathic push --handler` puts this file beside a model.

It needs the model's own code and transformers only, and answers one turn at a time, without a cache between turns. A
request is `{"inputs": MESSAGES, "parameters": {...}}`: messages as of OpenAI's chat completions, and arguments of
`generate`. The answer is `{"reply": TEXT}`.
"""

import base64
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

PARAMETERS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k")


class EndpointHandler:
    """
    Answers requests to the endpoint.

    Args:
        path: folder of the model.
    """

    def __init__(self, path: str = ""):
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForMultimodalLM.from_pretrained(path, trust_remote_code=True, dtype="auto")
        self.model = model.eval().to(device)

    def __call__(self, data: dict) -> dict:
        """
        Answer a request.

        Raises:
            ValueError: for a request of another form, and for a clip that cannot be read.
        """
        messages, parameters = data.get("inputs"), data.get("parameters") or {}
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("`inputs` must be a text or a list of messages.")
        unknown = sorted(set(parameters) - set(PARAMETERS))
        if unknown:
            raise ValueError(f"Unknown parameters: {', '.join(unknown)}. Known are {', '.join(PARAMETERS)}.")
        last = len(messages) - 1
        inputs = self.processor.apply_chat_template(
            [_message(message, keep_clips=place == last) for place, message in enumerate(messages)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **{"max_new_tokens": 128, "do_sample": False, **parameters})
        reply = output[0, inputs["input_ids"].shape[1] :]
        return {"reply": self.processor.decode(reply, skip_special_tokens=True).strip()}


def _message(message: dict, keep_clips: bool) -> dict:
    """Convert a message to the processor's form. Only bytes are accepted as clips, never a path."""
    content: Any = message.get("content") or ""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts, kinds = [], {part.get("type") for part in content if isinstance(part, dict)}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append({"type": "text", "text": part.get("text")})
        elif kind not in ("input_audio", "audio_url", "video_url"):
            raise ValueError(f"A part has the type {kind!r}; known are text, input_audio, audio_url and video_url.")
        elif keep_clips:
            try:
                given = part[kind]
                data = given["data"] if kind == "input_audio" else given["url"].partition(";base64,")[2]
                clip = base64.b64decode(data, validate=True)
            except (AttributeError, KeyError, TypeError, ValueError):
                clip = b""
            if not clip:
                raise ValueError(f"The {kind} of a message has no clip; give base64, or a data URL in base64.")
            if kind == "video_url":
                parts.append({"type": "video", "bytes": clip})
            # The sound of a video is used too, unless another sound is given or there is none.
            if kind != "video_url" or (not kinds & {"input_audio", "audio_url"} and _has_sound(clip)):
                parts.append({"type": "audio", "bytes": clip})
    return {**{key: message[key] for key in ("role", "name") if message.get(key)}, "content": parts}


def _has_sound(clip: bytes) -> bool:
    import io

    import av

    with av.open(io.BytesIO(clip), options={"protocol_whitelist": "none"}) as container:
        return bool(container.streams.audio)
