"""The template's process: `python -m outdraft.server.render_worker FD`.

A chat template is foreign code and messages are foreign data. It runs here, sandboxed
(text/chat.py), with bounded memory, in a process that renderer.py kills when it takes too long.
"""

import contextlib
import resource
import signal
import socket
import sys
from pathlib import Path

from outdraft.errors import OutdraftError
from outdraft.server.wire import pack, receive
from outdraft.text.chat import ChatTemplate

MAX_MEMORY_BYTES = 1 << 30


def main() -> None:
    """Load one template, then render until the server goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    order = receive(sock)
    if order is None:
        return
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    template = ChatTemplate.load(Path(order["path"]))
    sock.sendall(pack({"ready": True}))
    while (message := receive(sock)) is not None:
        try:
            if template is None:
                answer = {"error": "this model has no chat template", "hint": "use /v1/completions"}
            else:
                text = template.render(
                    message["messages"],
                    tools=message["tools"],
                    add_generation_prompt=message["add_generation_prompt"],
                    **message["options"],
                )
                answer = {"text": text}
        except OutdraftError as error:
            answer = {"error": error.message, "hint": error.hint}
        except (MemoryError, RecursionError):
            answer = {"error": "the chat template needs too much memory", "hint": "shorten it"}
        sock.sendall(pack(answer))


if __name__ == "__main__":
    main()
