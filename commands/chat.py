"""`empathic chat`: a conversation in the terminal."""

import os

from empathic.commands import add_command


def run(arguments) -> int:
    from transformers import TextStreamer

    from empathic.chat import ChatSession
    from empathic.media_empathic import MediaError
    from empathic.modeling_empathic import EmpathicForConditionalGeneration
    from empathic.processing_empathic import EmpathicProcessor

    model = EmpathicForConditionalGeneration.from_pretrained(arguments.model, dtype="auto").eval()
    processor = EmpathicProcessor.from_pretrained(arguments.model)
    session, clips = ChatSession(model, processor), {}
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("Say something. /audio FILE and /video FILE go with your next sentence (/clip FILE is both).")
    print("/save FILE and /load FILE keep a conversation, /new starts one, /quit ends.")
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
                session, clips = ChatSession(model, processor), {}
            elif command == "/quit":
                return 0
            elif command.startswith("/"):
                print(f"There is no command {command}.")
            elif line or clips:
                pending, clips = clips, {}
                print("bot: ", end="", flush=True)
                session.reply(line, **pending, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
        except (MediaError, OSError, ValueError) as error:
            print(f"\n{error}")


def _readable(path: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path!r}.")
    return path


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(commands, "chat", run, "talk to a model in the terminal", "empathic chat runs/quickstart/model")
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--max_new_tokens", type=int, default=128, help="length of a reply at most (%(default)s)")
