"""`empathic chat`: a conversation in the terminal."""

import os
import sys
from contextlib import closing

from ..benchmarks.efficiency_options import positive
from ..errors import describe, loading
from ..files import clean_path
from . import add_command


def run(arguments) -> int:
    if sys.stdin is None:
        raise ValueError("stdin is closed, but a conversation is read from it. Run the command in a terminal.")
    from ..chat import ChatSession
    from ..modeling_empathic import EmpathicForConditionalGeneration
    from ..processing_empathic import EmpathicProcessor

    with loading(arguments.model):
        model = EmpathicForConditionalGeneration.from_pretrained(arguments.model, dtype="auto").eval()
        processor = EmpathicProcessor.from_pretrained(arguments.model)
    options = {"max_memories": arguments.max_memories, "recall": arguments.recall}
    session, clips = ChatSession(model, processor, **options), {}
    print("Say something. /audio FILE or /video FILE adds a recording to your next sentence (/clip FILE adds both).")
    print(
        "/save FILE and /load FILE save and load a conversation, /new starts over, /quit exits, Ctrl-C stops a reply."
    )
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, argument = line.partition(" ")
        argument = clean_path(argument)
        try:
            if command in ("/audio", "/video", "/clip"):
                path = _readable(_named(command, argument))
                for kind in ("audio", "video") if command == "/clip" else (command[1:],):
                    clips[kind] = path
            elif command == "/save":
                session.save(_named(command, argument))
            elif command == "/load":
                session = ChatSession.load(_named(command, argument), model, processor)
            elif command == "/new":
                session, clips = ChatSession(model, processor, **options), {}
            elif command == "/quit":
                return 0
            elif command.startswith("/"):
                print(f"There is no command {command}.")
            elif line or clips:
                pending, clips = clips, {}
                _answer(session, line, pending, arguments.max_new_tokens)
        except Exception as error:  # whatever fails, the conversation so far is kept
            print(f"\n{describe(error)}")


def _answer(session, line: str, clips: dict, max_new_tokens: int) -> None:
    """Print the reply while it is generated."""
    print("bot: ", end="", flush=True)
    try:
        with closing(session.stream(line, **clips, max_new_tokens=max_new_tokens)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(stopped; this turn is not part of the conversation)")


def _readable(path: str) -> str:
    """Find a clip's file, also if its name is in another Unicode normal form."""
    from ..media_empathic import existing_path

    found = existing_path(path)
    if not os.path.isfile(found):
        raise FileNotFoundError(f"There is no file {path!r}.")
    return found


def _named(command: str, path: str) -> str:
    if not path:
        raise ValueError(f"Name a file: {command} FILE.")
    return path


def add(commands) -> None:
    """Add the command."""
    sub = add_command(commands, "chat", run, "talk to a model in the terminal", "empathic chat runs/quickstart/model")
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--max_new_tokens", type=positive, default=128, help="maximum length of a reply (%(default)s)")
    sub.add_argument(
        "--max_memories", type=positive, help="maximum number of memory vectors in the prompt (default: no limit)"
    )
    sub.add_argument(
        "--recall", type=int, default=0, metavar="N",
        help="earlier utterances that the prompt has as text too, those most like the sentence (%(default)s)",
    )  # fmt: skip
