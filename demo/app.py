"""The Gradio page for a conversation with the model, and an API for programs."""

import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from transformers.utils import logging

from ..hosts import host_names
from ..media_empathic import MediaError
from .examples import Example
from .render import plain, render_conversation, render_notice, render_turn
from .server_folder import PREFIX, ServerFolder, sweep
from .serving import Guard, forgetting, receive_route
from .session import Chatbot, ConversationError, ShownConversation, ShownTurn, Stopped
from .uploads import Limits, UploadError, discard, read_upload

logger = logging.get_logger(__name__)

REFUSALS = (UploadError, ConversationError, MediaError)
STOPPED = "Stopped. This turn is discarded; your text is back in the box."
FAILED = "Something went wrong, and this turn is discarded. Please try again."
LARGEST_SAVED = 8_000_000  # maximum size of a saved conversation, in bytes
REDRAW = 0.05  # minimum seconds between two updates of a reply in the browser
AT_ONCE = 32  # turns in progress: few are read or answered at once, the others wait with their clip read
READERS = 2  # clips that are read at once
TEMPORARY = "GRADIO_TEMP_DIR"  # environment variable with Gradio's folder for uploads
# Runs in the browser, because only it knows what the visitor typed in the meantime: `taken`, a sent text, leaves the
# box, and `back` comes back into it, before what is there now.
CHANGE_BOX = """(box, change) => {
  if (!change || change === window.lastChangeOfBox) return box;  // Gradio may report a change twice
  window.lastChangeOfBox = change;
  const { taken, back } = JSON.parse(change);
  if (taken && box.startsWith(taken)) box = box.slice(taken.length).trimStart();
  return back ? (box ? back + "\\n" + box : back) : box;
}"""
SAVE = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""


class Page:
    """
    The page of a chatbot: `blocks` holds the Gradio components, `launch` serves the page.

    Args:
        chatbot: the chatbot that answers.
        limits: limits on what visitors send.
        concurrency: number of turns answered at once; further turns wait, and meanwhile their clips are read.
        queue: maximum number of turns in the queue.
        examples: conversations to start from.
        keep_seconds: seconds that the conversation of a visitor who left is kept, in case only the connection broke.
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
        self.turns = {"concurrency_limit": AT_ONCE, "concurrency_id": "turns"}
        self.model, self.readers = threading.Semaphore(concurrency), threading.Semaphore(READERS)
        self.examples = {f"{number}: {example.name}": example for number, example in enumerate(examples, 1)}
        self.folders = [_upload_folder()]
        # Copies with unique names, so that the clips of the examples are not deleted with the uploads.
        self.folders.append(ServerFolder(Path(tempfile.gettempdir())))
        self.clips = {name: self._copy(example.clip) for name, example in self.examples.items()}
        self.kept = {path.name for path in self.clips.values()}
        self.keep_seconds = keep_seconds
        self.uploads: dict[str, set[str]] = {}  # visitor -> paths
        self.blocks = self._build()
        self.blocks.queue(max_size=queue)

    def launch(self, allowed_hosts: Iterable[str] = (), **options) -> None:
        """
        Serve the page.

        Args:
            allowed_hosts: names under which browsers reach the page, besides localhost, IP addresses, and those of
                Gradio's tunnel or of a Space: for example that of a proxy. `*` allows all.
            options: see `gradio.Blocks.launch`.
        """
        server_name = options.get("server_name") or os.environ.get("GRADIO_SERVER_NAME")
        names = host_names(server_name, bool(options.get("share")), allowed_hosts)
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
            "max_threads": 40 + AT_ONCE,  # a turn that waits takes up a thread
            "app_kwargs": {
                "lifespan": forgetting(self._forget, self.keep_seconds),
                "middleware": [Middleware(Guard, names=names, limits=self.limits)],
            },
        }
        if options.get("auth") is None:  # with `auth`, use Gradio's own route: only it checks the login
            settings["app_kwargs"]["routes"] = [receive_route(self.limits)]
        self.blocks.launch(**{**settings, **options})

    def close(self) -> None:
        """Stop all turns and the server, and delete all files of visitors."""
        for visitor in self.chatbot.visitors:
            self.chatbot.forget(visitor)
        self.blocks.close(verbose=False)
        for folder in self.folders:
            folder.delete()

    def _copy(self, clip: Path) -> Path:
        return Path(shutil.copyfile(clip, self.folders[1].path / f"{uuid.uuid4().hex}{clip.suffix}"))

    # ------------------------------------------------------------------ layout

    def _build(self) -> gr.Blocks:
        names = self.chatbot.comparisons
        with gr.Blocks(title="empathic", analytics_enabled=False, delete_cache=(300, 1800)) as blocks:
            gr.HTML(
                f"<h1>Talk to it with your face and voice</h1><p>Model: {plain(self.chatbot.checkpoints[0].name)}. "
                "Clips are deleted once they are read, or when you leave; the conversation is deleted "
                f"{self.keep_seconds / 60:g} minutes later.</p>",
                elem_id="head",
            )
            self.conversation = gr.State(ShownConversation())
            self.editing = gr.State(False)
            self.draft = gr.State("")  # what was in the box before the last turn was edited
            self.replaced = gr.State(None)  # the conversation and the text before Clear, Load or an example
            with gr.Column(elem_id="conversation"):
                self.past = gr.HTML(render_conversation(ShownConversation()), elem_id="past")
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
                label="Compare each reply with the reply of …",
                elem_id="compare",
            )
            with gr.Row(elem_id="tools"):
                options = {"size": "sm", "min_width": 72}
                self.retry = gr.Button("Retry", elem_id="retry", **options)
                self.edit = gr.Button("Edit", elem_id="edit", **options)
                self.clear = gr.Button("Clear", elem_id="clear", **options)
                self.undo = gr.Button("Undo", elem_id="undo", interactive=False, **options)
                self.save = gr.Button("Save", elem_id="save", **options)
                self.load = gr.UploadButton("Load", file_types=[".json"], elem_id="load", **options)
                # Gradio's `preprocess` also creates an empty file that is never deleted.
                self.load.preprocess = lambda file: None if file is None else file.path
            self.example = gr.Dropdown(
                list(self.examples),
                value=None,
                label="Start from an example",
                visible=bool(self.examples),
                elem_id="example",
            )
            self.saved = gr.Textbox(visible="hidden", elem_id="saved")
            self.box = gr.Textbox(visible="hidden", elem_id="box")  # a change of the text, see CHANGE_BOX
            self._connect(blocks)
            self._add_api()
        for component in blocks.blocks.values():
            _take_uploads_only(component)
        return blocks

    @property
    def _buttons(self) -> list:
        return [self.send, self.retry, self.edit, self.clear, self.load, self.example]

    def _connect(self, blocks: gr.Blocks) -> None:
        answering = [
            self.conversation, self.editing, self.draft, self.replaced, self.media, self.past, self.now, self.notice,
            self.text, self.box, self.voice, self.clip, self.stop, self.undo, *self._buttons,
        ]  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {**private, "queue": False}
        said = [self.text, self.voice, self.clip, self.compare, self.conversation, self.editing, self.draft]
        gr.on(
            [self.send.click, self.text.submit],
            self._send, said, answering, trigger_mode="once", **private, **self.turns,
        )  # fmt: skip
        self.box.change(None, [self.text, self.box], self.text, js=CHANGE_BOX, **private)
        self.retry.click(self._retry, [self.compare, self.conversation], answering, **private, **self.turns)
        self.stop.click(self._stop, None, None, **quick)
        shown = [self.text, self.conversation, self.editing, self.draft]
        self.edit.click(self._edit, shown, answering, **quick)
        self.clear.click(self._clear, shown, answering, **quick)
        self.undo.click(self._undo, self.replaced, answering, **quick)
        self.save.click(ShownConversation.to_json, self.conversation, self.saved, **quick).then(
            None, self.saved, None, js=SAVE, **private
        )
        self.load.upload(self._load, [self.load, *shown], answering, **quick)
        self.example.input(self._start_from, [self.example, *shown], answering, **quick)
        for component in (self.voice, self.clip):
            component.change(self._hold, component, None, **quick)
        blocks.unload(self._leave)

    # ------------------------------------------------------------------ event handlers

    def _send(self, text, voice, clip, compare, conversation, editing, draft, request: gr.Request) -> Iterator[dict]:
        base = conversation.without_last() if editing else conversation
        try:
            self.limits.check_text(text)
            clips = self._read(voice, clip)
            if editing and not clips:
                clips = self._clips_if_kept(request.session_hash, conversation)
        except REFUSALS as error:
            # The text stays in the box for another attempt; a refused upload is already deleted.
            gone = {} if len(text) > self.limits.characters else {self.voice: None, self.clip: None}
            yield {self.notice: render_notice(str(error), error=True), **gone}
            return
        back = draft if editing else ""
        yield from self._answer(request.session_hash, conversation, base, text, clips, compare, back=back)

    def _retry(self, compare, conversation, request: gr.Request) -> Iterator[dict]:
        try:
            clips = self.chatbot.clips_of_last(request.session_hash, conversation)
        except ConversationError as error:
            yield {self.notice: render_notice(str(error), error=True)}
            return
        base, text = conversation.without_last(), conversation.turns[-1].text
        yield from self._answer(request.session_hash, conversation, base, text, clips, compare, another=True)

    def _taking_turns(self, turns: Iterator[ShownTurn]) -> Iterator[ShownTurn]:
        """Yield the states of a turn; from its second state on, the turn waits for the model and holds it."""
        with closing(turns):
            yield next(turns)
            with self.model:
                yield from turns

    def _answer(self, visitor, conversation, base, text, clips, compare, another=False, back="") -> Iterator[dict]:
        """Stream the turn after `base`; after any error the page shows `conversation` again. `back`: a text for the box
        once the turn has begun."""
        before = {self.past: render_conversation(conversation), self.now: "", **self._busy(False)}
        turns = self._taking_turns(self.chatbot.turn(visitor, base, text, clips, compare, another))
        sent = False
        drawn, turn = 0.0, None
        try:
            for turn in turns:
                if turn.answers and time.monotonic() - drawn < REDRAW:
                    continue
                state = {self.now: render_turn(turn, writing=True)}
                if not turn.answers:
                    state |= {self.past: "" if not base.turns else render_conversation(base), **self._busy(True)}
                    state |= {self.notice: "", self.voice: None, self.clip: None}
                    state |= self._undoing(None)  # what a new turn follows cannot be brought back any more
                    if not another and not sent:
                        state |= {self.box: _change_of_box(taken=text, back=back), self.draft: ""}
                        sent = True
                drawn = time.monotonic()
                yield state
        except Stopped:
            again = {self.box: _change_of_box(back=text)} if sent else {}
            yield {**before, **again, self.notice: render_notice(STOPPED if not another else "Stopped.")}
        except REFUSALS as error:
            again = {self.box: _change_of_box(back=text)} if sent else {}
            yield {**before, **again, self.notice: render_notice(str(error), error=True)}
        except Exception as error:  # the page must not stay busy
            logger.error("A turn failed: %r", error, exc_info=True)
            again = {self.box: _change_of_box(back=text)} if sent else {}
            yield {**before, **again, self.notice: render_notice(FAILED, error=True)}
        else:
            yield {**self._busy(False), **self._showing(base.plus(turn))}
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
        """Record which visitor uploaded a file, so that it is deleted when the visitor leaves."""
        if path is not None:
            self.uploads.setdefault(request.session_hash, set()).add(path)

    def _edit(self, text, conversation, editing, draft) -> dict:
        if editing:
            return {self.editing: False, self.edit: "Edit", self.text: draft, self.draft: "", self.notice: ""}
        if not conversation.turns:
            return {self.notice: render_notice("There is no turn yet.", error=True)}
        note = "Change your last turn and send it; its clip is sent again, unless you add another clip."
        if text:
            note += " What you were writing comes back afterwards."
        return {
            self.editing: True,
            self.edit: "Don't edit",
            self.text: conversation.turns[-1].text,
            self.draft: text,
            self.notice: render_notice(note),
        }

    def _clear(self, text, conversation, editing, draft, request: gr.Request) -> dict:
        self.chatbot.forget(request.session_hash)
        written = draft if editing else text
        kept = self._undoing((conversation, written) if conversation.turns or written else None)
        note = {self.notice: render_notice("Undo brings the conversation and your text back.")} if kept else {}
        shown = self._showing(ShownConversation())
        return {**shown, **note, **kept, self.text: "", self.draft: "", self.voice: None, self.clip: None}

    def _undo(self, replaced) -> dict:
        if replaced is None:
            return {self.notice: ""}
        conversation, text = replaced
        back = {self.box: _change_of_box(back=text)} if text else {}
        return {**self._showing(conversation), **back, **self._undoing(None)}

    def _undoing(self, replaced: tuple[ShownConversation, str] | None) -> dict:
        """Updates that remember what Undo brings back, or that there is nothing to undo."""
        return {self.replaced: replaced, self.undo: gr.update(interactive=replaced is not None)}

    def _load(self, path, text, conversation, editing, draft) -> dict:
        try:
            if Path(path).stat().st_size > LARGEST_SAVED:
                raise ConversationError("This file is too large for a saved conversation.")
            found = ShownConversation.from_json(Path(path).read_bytes())
        except (ConversationError, OSError) as error:
            return {self.notice: render_notice(str(error), error=True)}
        finally:
            self._discard(path)
        note = f"The conversation with {len(found.turns)} turns is loaded. The next turn encodes it into the memory."
        written = {self.text: draft, self.draft: ""} if editing else {}
        kept = self._undoing((conversation, "") if conversation.turns else None)
        return {**self._showing(found), **written, **kept, self.notice: render_notice(note)}

    def _start_from(self, name, text, conversation, editing, draft) -> dict:
        if name not in self.examples:
            return {self.notice: ""}
        example, written = self.examples[name], draft if editing else text
        note = "The text and the clip of the example are filled in. Press Send."
        if written.strip() and written != example.text:
            note = f"The clip of the example is filled in; your text stays. The example says: {example.text}"
        shown = {self.text: written if written.strip() else example.text, self.draft: ""}
        shown |= {self.clip: str(self.clips[name]), self.notice: render_notice(note)}
        shown |= {self.media: gr.update(open=True), **self._undoing((conversation, "") if conversation.turns else None)}
        return {**self._showing(example.conversation), **shown}

    def _showing(self, conversation: ShownConversation) -> dict:
        """Updates that make the page show a conversation."""
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
        """Decode the clips of a turn; the files are deleted even if they cannot be decoded."""
        frames = self.chatbot.checkpoints[0].processor.num_frames
        if voice is None and clip is None:
            return {}
        try:
            with self.readers:
                found = {} if clip is None else read_upload(clip, ("audio", "video"), frames, self.limits)
                return found | ({} if voice is None else read_upload(voice, ("audio",), frames, self.limits))
        finally:
            for path in (voice, clip):
                self._discard(path)

    def _discard(self, path: str | None) -> None:
        if path is not None and Path(path).name not in self.kept:
            discard(path, self.blocks.GRADIO_CACHE)

    def _clips_if_kept(self, visitor: str, conversation: ShownConversation) -> dict[str, dict]:
        try:
            return self.chatbot.clips_of_last(visitor, conversation)
        except ConversationError:
            return {}

    # ------------------------------------------------------------------ API

    def _add_api(self) -> None:
        voice, clip = gr.Audio(visible=False, type="filepath"), gr.Video(visible=False, include_audio=True)
        text, found = gr.Textbox(visible=False), gr.JSON(visible=False)
        conversation, memory = gr.JSON(visible=False), gr.Checkbox(True, visible=False)
        button = gr.Button(visible=False)
        button.click(self.reply, [text, voice, clip, conversation, memory], found, api_name="reply", **self.turns)
        button.click(self.emotion, [text, voice, clip], found, api_name="emotion", **self.turns)

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
        Answer a turn: stream the reply, and at the end return the cost of the turn.

        Args:
            text: text of the turn; may be empty if there is a clip.
            voice: an audio file.
            clip: a video file, with or without sound.
            conversation: `conversation` of the previous reply, or a saved conversation; null starts a new conversation.
            memory: false answers without the history.

        Returns:
            `reply`, `emotions` (seven probabilities, or null), and in the last result also `seconds`,
            `memory_vectors`, `history_tokens` and `conversation`.
        """
        try:
            self.limits.check_text(text or "")
            base = ShownConversation() if conversation is None else ShownConversation.from_record(conversation)
            visitor = _program(request.session_hash)
            turn, turns = None, self.chatbot.turn(visitor, base, text or "", self._read(voice, clip), memory=memory)
            with closing(self._taking_turns(turns)) as turns:
                for turn in turns:
                    if turn.answers:
                        yield {"reply": turn.answers[0].text, "emotions": turn.emotions}
        except REFUSALS as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield {**_described(turn), "conversation": base.plus(turn).record()}

    def emotion(self, text: str = "", voice: str | None = None, clip: str | None = None) -> dict:
        """
        Return the probabilities of the seven emotions for a turn.

        Args:
            text: text of the turn; used only by models that were trained with the sentence.
            voice: an audio file.
            clip: a video file, with or without sound.
        """
        try:
            self.limits.check_text(text or "")
            clips = self._read(voice, clip)
            with self.model:
                found = self.chatbot.emotions(text or "", clips)
            if found is None:
                raise ConversationError("Give a voice or a clip: this model cannot name the emotion without them.")
        except REFUSALS as error:
            raise gr.Error(str(error), print_exception=False) from None
        return found


def _program(session: str) -> str:
    """The visitor key of an API session, distinct from the page's key (the Gradio session hash)."""
    return f"program {session}"


def _described(turn: ShownTurn) -> dict:
    answer = turn.answers[0]
    return {
        "reply": answer.text,
        "emotions": turn.emotions,
        "seconds": answer.seconds,
        "memory_vectors": answer.memory_vectors,
        "history_tokens": answer.history_tokens,
    }


def _upload_folder() -> ServerFolder:
    """Create a folder for the uploads to this server and make Gradio use it; delete the folders of dead servers."""
    given = os.environ.get(TEMPORARY)
    base = Path(given or tempfile.gettempdir())
    while base.name.startswith(PREFIX):  # that of an earlier page in this process
        base = base.parent
    for place in {base, Path(tempfile.gettempdir())}:
        sweep(place)
    folder = ServerFolder(base)
    os.environ[TEMPORARY] = str(folder.path)
    return folder


def _change_of_box(taken: str = "", back: str = "") -> str:
    """A change of the text in the box for CHANGE_BOX, unlike any earlier change."""
    return json.dumps({"taken": taken, "back": back, "number": uuid.uuid4().hex})


def _take_uploads_only(component) -> None:
    """Make a component refuse URLs: Gradio would download a URL of any size. Any component can be sent a file."""
    move = component.async_move_resource_to_block_cache

    async def take(path):
        if path is not None and "://" in str(path):
            raise gr.Error("Upload the file itself; URLs are not fetched.")
        return await move(path)

    component.async_move_resource_to_block_cache = take
