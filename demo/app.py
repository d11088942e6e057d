"""The page, on Gradio: a conversation with the model, and the same as an API for programs."""

import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import gradio as gr
from transformers.utils import logging

from empathic.demo.emotions import name_emotion
from empathic.demo.examples import Example
from empathic.demo.render import plain, render_conversation, render_notice, render_turn
from empathic.demo.serving import forgetting, receive_route
from empathic.demo.session import Chatbot, Conversation, ConversationError, Stopped, Turn
from empathic.demo.uploads import Limits, UploadError, discard, read_upload
from empathic.media_empathic import MediaError

logger = logging.get_logger(__name__)

REFUSALS = (UploadError, ConversationError, MediaError)
STOPPED = "Stopped. This turn is forgotten; your text is in the box again."
FAILED = "Something went wrong, and this turn is forgotten. Please try again."
LARGEST_SAVED = 8_000_000  # bytes of a saved conversation
REDRAW = 0.05  # seconds between two states of a reply on its way to the browser
SAVE = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""


class Page:
    """
    The page of a chatbot: `blocks` is Gradio's, `launch` serves it.

    Args:
        chatbot: who answers.
        limits: of what visitors send.
        concurrency: turns that are answered at once; the others wait in the queue.
        queue: how many may wait.
        examples: to start from.
        keep_seconds: for how long the conversation of a visitor who left is kept, should only a connection have broken.
    """

    def __init__(
        self,
        chatbot: Chatbot,
        limits: Limits | None = None,
        concurrency: int = 1,
        queue: int = 64,
        examples: Sequence[Example] = (),
        keep_seconds: float = 1800,
    ):
        self.chatbot, self.limits = chatbot, limits or Limits()
        self.model = {"concurrency_limit": concurrency, "concurrency_id": "model"}
        self.examples = {f"{number}: {example.name}": example for number, example in enumerate(examples, 1)}
        # Under names that no upload has, so that they are not deleted with the uploads.
        self.folder = tempfile.TemporaryDirectory(prefix="empathic-examples-")
        self.clips = {name: self._copy(example.clip) for name, example in self.examples.items()}
        self.kept = {path.name for path in self.clips.values()}
        self.keep_seconds = keep_seconds
        self.uploads: dict[str, set[str]] = {}  # by visitor
        self.blocks = self._build()
        self.blocks.queue(max_size=queue)

    def launch(self, **options) -> None:
        """Serves the page; see `gradio.Blocks.launch`."""
        assets = files("empathic.demo")
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        settings = {
            "theme": gr.themes.Default(**fonts),
            "css": assets.joinpath("page.css").read_text(encoding="utf-8"),
            "js": assets.joinpath("page.js").read_text(encoding="utf-8"),
            "max_file_size": int(self.limits.megabytes * 1e6),
            "footer_links": ["api"],
            "ssr_mode": False,
            "state_session_capacity": 300,
            "app_kwargs": {"lifespan": forgetting(self._forget, self.keep_seconds)},
        }
        if options.get("auth") is None:  # only Gradio's own route asks who is logged in
            settings["app_kwargs"]["routes"] = [receive_route(self.limits)]
        self.blocks.launch(**{**settings, **options})

    def _copy(self, clip: Path) -> Path:
        return Path(shutil.copyfile(clip, Path(self.folder.name) / f"{uuid.uuid4().hex}{clip.suffix}"))

    # ------------------------------------------------------------------ what it looks like

    def _build(self) -> gr.Blocks:
        names = self.chatbot.comparisons
        with gr.Blocks(title="empathic", analytics_enabled=False, delete_cache=(300, 1800)) as blocks:
            gr.HTML(
                f"<h1>Talk to it with your face and voice</h1><p>Model: {plain(self.chatbot.checkpoints[0].name)}. "
                "Clips are deleted once they are read, or when you leave; what was said is forgotten "
                f"{self.keep_seconds / 60:g} minutes later.</p>",
                elem_id="head",
            )
            self.conversation = gr.State(Conversation())
            self.editing = gr.State(False)
            with gr.Column(elem_id="conversation"):
                self.past = gr.HTML(render_conversation(Conversation()), elem_id="past")
                self.now = gr.HTML("", elem_id="now")
            self.notice = gr.HTML("", elem_id="notice")
            with gr.Row(equal_height=True, elem_id="say"):
                self.text = gr.Textbox(
                    show_label=False,
                    label="What you say",
                    placeholder="Say something",
                    lines=1,
                    max_lines=6,
                    autofocus=True,
                    scale=6,
                    elem_id="text",
                )
                self.send = gr.Button("Send", variant="primary", scale=1, min_width=64, elem_id="send")
                self.stop = gr.Button("Stop", scale=1, min_width=64, interactive=False, elem_id="stop")
            gr.HTML("Enter sends, Shift+Enter breaks the line, Esc stops.", elem_id="keys")
            self.media = gr.Accordion("Add your voice, your webcam or a file", open=False, elem_id="media")
            with self.media, gr.Row():
                self.voice = gr.Audio(
                    sources=["microphone", "upload"],
                    type="filepath",
                    label=f"Voice (at most {self.limits.seconds:g} s)",
                    editable=False,
                    buttons=[],
                    min_width=260,
                    elem_id="voice",
                )
                self.clip = gr.Video(
                    sources=["upload", "webcam"],
                    label=f"Face and voice (at most {self.limits.seconds:g} s, {self.limits.megabytes:g} MB)",
                    include_audio=True,
                    webcam_options=gr.WebcamOptions(mirror=False),
                    buttons=[],
                    height=300,
                    min_width=260,
                    elem_id="clip",
                )
            self.compare = gr.CheckboxGroup(
                [(label, key) for key, label in names.items()],
                label="Beside each reply, show the one of …",
                elem_id="compare",
            )
            with gr.Row(elem_id="tools"):
                options = {"size": "sm", "min_width": 72}
                self.retry = gr.Button("Retry", elem_id="retry", **options)
                self.edit = gr.Button("Edit", elem_id="edit", **options)
                self.clear = gr.Button("Clear", elem_id="clear", **options)
                self.save = gr.Button("Save", elem_id="save", **options)
                self.load = gr.UploadButton("Load", file_types=[".json"], elem_id="load", **options)
                # Gradio's own also makes an empty file, which stays.
                self.load.preprocess = lambda file: None if file is None else file.path
            self.example = gr.Dropdown(
                list(self.examples),
                value=None,
                label="Start from an example",
                visible=bool(self.examples),
                elem_id="example",
            )
            self.saved = gr.Textbox(visible="hidden", elem_id="saved")
            for component in (self.voice, self.clip):
                _take_uploads_only(component)
            self._connect(blocks)
            self._add_api()
        return blocks

    @property
    def _buttons(self) -> list:
        return [self.send, self.retry, self.edit, self.clear, self.load, self.example]

    def _connect(self, blocks: gr.Blocks) -> None:
        answering = [
            self.conversation, self.editing, self.media, self.past, self.now, self.notice, self.text, self.voice,
            self.clip, self.stop, *self._buttons,
        ]  # fmt: skip
        private = {"api_visibility": "private", "show_progress": "hidden"}
        quick = {**private, "queue": False}
        said = [self.text, self.voice, self.clip, self.compare, self.conversation, self.editing]
        gr.on(
            [self.send.click, self.text.submit],
            self._send, said, answering, trigger_mode="once", **private, **self.model,
        )  # fmt: skip
        self.retry.click(self._retry, [self.compare, self.conversation], answering, **private, **self.model)
        self.stop.click(self._stop, None, None, **quick)
        self.edit.click(self._edit, [self.conversation, self.editing], answering, **quick)
        self.clear.click(self._clear, None, answering, **quick)
        self.save.click(Conversation.to_json, self.conversation, self.saved, **quick).then(
            None, self.saved, None, js=SAVE, **private
        )
        self.load.upload(self._load, [self.load, self.conversation], answering, **quick)
        self.example.input(self._start_from, self.example, answering, **quick)
        for component in (self.voice, self.clip):
            component.change(self._hold, component, None, **quick)
        blocks.unload(self._leave)

    # ------------------------------------------------------------------ what happens on it

    def _send(self, text, voice, clip, compare, conversation, editing, request: gr.Request) -> Iterator[dict]:
        base = conversation.without_last() if editing else conversation
        try:
            self.limits.check_text(text)
            clips = self._read(voice, clip)
            if editing and not clips:
                clips = self._clips_if_kept(request.session_hash, conversation)
        except REFUSALS as error:
            # The text stays in the box for another try; an upload that was refused is gone.
            gone = {} if len(text) > self.limits.characters else {self.voice: None, self.clip: None}
            yield {self.notice: render_notice(str(error), error=True), **gone}
            return
        yield from self._answer(request.session_hash, conversation, base, text, clips, compare)

    def _retry(self, compare, conversation, request: gr.Request) -> Iterator[dict]:
        try:
            clips = self.chatbot.clips_of_last(request.session_hash, conversation)
        except ConversationError as error:
            yield {self.notice: render_notice(str(error), error=True)}
            return
        base, text = conversation.without_last(), conversation.turns[-1].text
        yield from self._answer(request.session_hash, conversation, base, text, clips, compare, another=True)

    def _answer(self, visitor, conversation, base, text, clips, compare, another=False) -> Iterator[dict]:
        """The turn after `base`, as it grows; whatever goes wrong, `conversation` is there again."""
        before = {self.past: render_conversation(conversation), self.now: "", **self._busy(False)}
        turns = self.chatbot.turn(visitor, base, text, clips, compare, another)
        drawn, turn = 0.0, None
        try:
            for turn in turns:
                if turn.answers and time.monotonic() - drawn < REDRAW:
                    continue
                state = {self.now: render_turn(turn, writing=True)}
                if not turn.answers:
                    state |= {self.past: "" if not base.turns else render_conversation(base), **self._busy(True)}
                    state |= {self.notice: "", self.text: "", self.voice: None, self.clip: None}
                drawn = time.monotonic()
                yield state
        except Stopped:
            again = {} if another else {self.text: text}
            yield {**before, **again, self.notice: render_notice(STOPPED if not another else "Stopped.")}
        except REFUSALS as error:
            yield {**before, self.text: text, self.notice: render_notice(str(error), error=True)}
        except Exception as error:  # the page must not stay busy
            logger.error("A turn failed: %r", error, exc_info=True)
            yield {**before, self.text: text, self.notice: render_notice(FAILED, error=True)}
        else:
            yield {**self._showing(base.plus(turn)), **self._busy(False)}
        finally:
            turns.close()

    def _stop(self, request: gr.Request) -> None:
        self.chatbot.stop(request.session_hash)

    def _leave(self, request: gr.Request) -> None:
        self._forget(request.session_hash)

    def _forget(self, visitor: str) -> None:
        for key in (visitor, _program(visitor)):
            self.chatbot.forget(key)
        for path in self.uploads.pop(visitor, ()):
            self._discard(path)

    def _hold(self, path: str | None, request: gr.Request) -> None:
        """Notes whose file it is, so that it goes with the visitor."""
        if path is not None:
            self.uploads.setdefault(request.session_hash, set()).add(path)

    def _edit(self, conversation, editing) -> dict:
        if editing:
            return {self.editing: False, self.edit: "Edit", self.text: "", self.notice: ""}
        if not conversation.turns:
            return {self.notice: render_notice("There is no turn yet.", error=True)}
        note = "Change your last turn and send it; its clip goes with it, unless you add another one."
        return {
            self.editing: True,
            self.edit: "Don't edit",
            self.text: conversation.turns[-1].text,
            self.notice: render_notice(note),
        }

    def _clear(self, request: gr.Request) -> dict:
        self.chatbot.forget(request.session_hash)
        return {**self._showing(Conversation()), self.text: "", self.voice: None, self.clip: None}

    def _load(self, path, conversation) -> dict:
        try:
            if Path(path).stat().st_size > LARGEST_SAVED:
                raise ConversationError("This file is too large for a saved conversation.")
            found = Conversation.from_json(Path(path).read_bytes())
        except (ConversationError, OSError) as error:
            return {self.notice: render_notice(str(error), error=True)}
        finally:
            self._discard(path)
        note = f"The conversation of {len(found.turns)} turns is loaded. The next turn reads it into the memory."
        return {**self._showing(found), self.notice: render_notice(note)}

    def _start_from(self, name) -> dict:
        if name not in self.examples:
            return {self.notice: ""}
        example = self.examples[name]
        note = render_notice("Press Send: the text and the clip of the example are there.")
        shown = {self.text: example.text, self.clip: str(self.clips[name]), self.notice: note}
        shown[self.media] = gr.update(open=True)
        return {**self._showing(example.conversation), **shown}

    def _showing(self, conversation: Conversation) -> dict:
        """The page with another conversation."""
        return {
            self.conversation: conversation,
            self.editing: False,
            self.edit: gr.update(value="Edit", interactive=True),
            self.past: render_conversation(conversation),
            self.now: "",
            self.notice: "",
        }

    def _busy(self, busy: bool) -> dict:
        buttons = {button: gr.update(interactive=not busy) for button in self._buttons}
        return {**buttons, self.stop: gr.update(interactive=busy)}

    # ------------------------------------------------------------------ uploads

    def _read(self, voice: str | None, clip: str | None) -> dict[str, dict]:
        """The clips of a turn, decoded; the files are deleted, whatever is in them."""
        frames = self.chatbot.checkpoints[0].processor.num_frames
        try:
            found = {} if clip is None else read_upload(clip, ("audio", "video"), frames, self.limits)
            return found | ({} if voice is None else read_upload(voice, ("audio",), frames, self.limits))
        finally:
            for path in (voice, clip):
                self._discard(path)

    def _discard(self, path: str | None) -> None:
        if path is not None and Path(path).name not in self.kept:
            discard(path, self.blocks.GRADIO_CACHE)

    def _clips_if_kept(self, visitor: str, conversation: Conversation) -> dict[str, dict]:
        try:
            return self.chatbot.clips_of_last(visitor, conversation)
        except ConversationError:
            return {}

    # ------------------------------------------------------------------ for programs

    def _add_api(self) -> None:
        voice, clip = gr.Audio(visible=False, type="filepath"), gr.Video(visible=False, include_audio=True)
        for component in (voice, clip):
            _take_uploads_only(component)
        text, found = gr.Textbox(visible=False), gr.JSON(visible=False)
        conversation, memory = gr.JSON(visible=False), gr.Checkbox(True, visible=False)
        button = gr.Button(visible=False)
        button.click(self.reply, [text, voice, clip, conversation, memory], found, api_name="reply", **self.model)
        button.click(self.emotion, [text, voice, clip], found, api_name="emotion", **self.model)

    def reply(
        self,
        text: str,
        voice: str | None = None,
        clip: str | None = None,
        conversation: dict | None = None,
        memory: bool = True,
        request: gr.Request = None,
    ) -> Iterator[dict]:
        """
        Answers one turn; gives the reply as it grows, at the end with what the turn cost.

        Args:
            text: what is said; may be empty beside a clip.
            voice: an audio file.
            clip: a video file, with or without sound.
            conversation: `conversation` of the reply before, or a saved conversation; nothing starts a new one.
            memory: false answers as if nothing was said before.

        Returns:
            `reply`, `emotions` (seven probabilities, or null), and with the last one `seconds`, `memory_vectors`,
            `history_tokens` and `conversation`.
        """
        try:
            self.limits.check_text(text or "")
            base = Conversation() if conversation is None else Conversation.from_record(conversation)
            visitor = _program(request.session_hash)
            turn = None
            for turn in self.chatbot.turn(visitor, base, text or "", self._read(voice, clip), memory=memory):
                if turn.answers:
                    yield {"reply": turn.answers[0].text, "emotions": turn.emotions}
        except REFUSALS as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield {**_described(turn), "conversation": base.plus(turn).record()}

    def emotion(self, text: str = "", voice: str | None = None, clip: str | None = None) -> dict:
        """
        The probabilities of the seven emotions of one turn.

        Args:
            text: what is said; only models that were trained with the sentence read it.
            voice: an audio file.
            clip: a video file, with or without sound.
        """
        try:
            self.limits.check_text(text or "")
            first = self.chatbot.checkpoints[0]
            found = name_emotion(first.model, first.processor, text or "", self._read(voice, clip))
            if found is None:
                raise ConversationError("Give a voice or a clip: this model tells the emotion from them.")
        except REFUSALS as error:
            raise gr.Error(str(error), print_exception=False) from None
        return found


def _program(session: str) -> str:
    """Under which key a program talks; the page has Gradio's."""
    return f"program {session}"


def _described(turn: Turn) -> dict:
    answer = turn.answers[0]
    return {
        "reply": answer.text,
        "emotions": turn.emotions,
        "seconds": answer.seconds,
        "memory_vectors": answer.memory_vectors,
        "history_tokens": answer.history_tokens,
    }


def _take_uploads_only(component) -> None:
    """Gradio would fetch an address that a program gives instead of a file, of any size."""
    move = component.async_move_resource_to_block_cache

    async def take(path):
        if path is not None and "://" in str(path):
            raise gr.Error("Upload the file itself; addresses are not fetched.")
        return await move(path)

    component.async_move_resource_to_block_cache = take
