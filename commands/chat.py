"""`empathic chat`: a conversation in the terminal."""

import os
from contextlib import closing

from empathic.commands import add_command


def run(arguments) -> int:
    from empathic.chat import ChatSession
    from empathic.media_empathic import MediaError
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    model = EmpathicForConditionalGeneration.from_pretrained(arguments.model, dtype="auto").eval()
    processor = EmpathicProcessor.from_pretrained(arguments.model)
    session, clips = ChatSession(model, processor, max_memories=arguments.max_memories), {}
    print("Say something. /audio FILE and /video FILE go with your next sentence (/clip FILE is both).")
    print("/save FILE and /load FILE keep a conversation, /new starts one, /quit ends. Ctrl-C stops a reply.")
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if command in ("/audio", "/video", "/clip"):
                for kind in ("audio", "video") if command == "/clip" else (command[1:],):
                    clips[kind] = _readable(argument)
            elif command == "/save":
                session.save(argument)
            elif command == "/load":
                session = ChatSession.load(argument, model, processor)
            elif command == "/new":
                session, clips = ChatSession(model, processor, max_memories=arguments.max_memories), {}
            elif command == "/quit":
                return 0
            elif command.startswith("/"):
                print(f"There is no command {command}.")
            elif line or clips:
                pending, clips = clips, {}
                _answer(session, line, pending, arguments.max_new_tokens)
        except (MediaError, OSError, ValueError) as error:
            print(f"\n{error}")


def _answer(session, line: str, clips: dict, max_new_tokens: int) -> None:
    """Prints the reply as it is written."""
    print("bot: ", end="", flush=True)
    try:
        with closing(session.stream(line, **clips, max_new_tokens=max_new_tokens)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)")


def _readable(path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    return path


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(commands, "chat", run, "talk to a model in the terminal", "empathic chat runs/quickstart/model")
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--max_new_tokens", type=int, default=128, help="length of a reply at most (%(default)s)")
    sub.add_argument(
        "--max_memories", type=int, help="utterances whose vectors are kept in the prompt at most (default: all)"
    )
