"""A conversation with memory."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class ChatSession:
    """
    Keeps a conversation with the model: every utterance is read into the memory once and costs one vector ever after
    (paper's Sec. 3.2).

    Args:
        model: an `EmpathicForConditionalGeneration`.
        processor: its `EmpathicProcessor`.
        system (`str`, *optional*): replaces the template's system prompt.

    Attributes:
        messages (`list[dict]`): what was said so far, as `{"role", "content"}` with plain strings.
        vectors (`torch.Tensor` of shape `(utterances, hidden_size)`): their memory vectors.
    """

    def __init__(self, model, processor, system: str | None = None):
        self.model, self.processor, self.system = model, processor, system
        self.messages: list[dict] = []
        self.state = model.new_memory_state()
        self.vectors = torch.zeros(0, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype)

    def reply(self, text: str, audio=None, video=None, **generate_kwargs) -> str:
        """
        Answers one turn and remembers it.

        Args:
            text: what the user says.
            audio, video: clips: a path, the bytes of a file, or a content item such as
                `{"audio": samples, "sampling_rate": 16000}` or `{"video": frames}`.
            generate_kwargs: of `model.generate`, such as `max_new_tokens` (128 by default) or `streamer`.

        Raises:
            MediaError: for a clip that cannot be read. After any error the session is as it was.
        """
        content = [_media_item(kind, clip) for kind, clip in (("audio", audio), ("video", video)) if clip is not None]
        if text:
            content.append({"type": "text", "text": text})
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turn = {"role": "user", "content": content}
        inputs = self.processor.apply_chat_template(
            [*system, *self.messages, turn],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        inputs.pop("memory_input_ids", None)
        inputs.pop("memory_attention_mask", None)
        if self.messages:
            inputs["memory_embeds"] = self.vectors[None]
        output = self.model.generate(**inputs, **{"max_new_tokens": 128, **generate_kwargs})
        reply = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self._remember({"role": "user", "content": text}, {"role": "assistant", "content": reply})
        return reply

    def _remember(self, *messages: dict) -> None:
        ids = [i for m in messages for i in self.processor.encode_utterance(m["role"], m["content"])]
        state = self.state.fork()
        vectors = self.model.append_to_memory(state, torch.tensor([ids], device=self.model.device))
        self.state = state
        self.vectors = torch.cat([self.vectors, vectors.to(self.vectors)])
        self.messages = [*self.messages, *messages]

    def save(self, path: str) -> None:
        """Writes the conversation and its memory to one safetensors file."""
        tensors = {"vectors": self.vectors, **{f"state.{k}": v for k, v in self.state.state_dict().items()}}
        record = {"messages": json.dumps(self.messages), "system": json.dumps(self.system)}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=record)

    @classmethod
    def load(cls, path: str, model, processor) -> "ChatSession":
        """Takes up a saved conversation, with the model and processor it was held with."""
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            record = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        session = cls(model, processor, system=json.loads(record["system"]))
        vectors = tensors.pop("vectors")
        if vectors.shape[1] != session.vectors.shape[1]:
            raise ValueError(
                f"{path} holds memory vectors of width {vectors.shape[1]}, but the model's are "
                f"{session.vectors.shape[1]} wide: it was saved with another model."
            )
        session.vectors = vectors.to(session.vectors)
        session.state.load_state_dict({name.removeprefix("state."): tensor for name, tensor in tensors.items()})
        session.messages = json.loads(record["messages"])
        return session


def _media_item(kind: str, clip) -> dict:
    if isinstance(clip, dict):
        return {"type": kind, **clip}
    return {"type": kind, "bytes": clip} if isinstance(clip, bytes) else {"type": kind, "path": str(clip)}
