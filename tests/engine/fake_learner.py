"""A learner that learns nothing: `fake_learner.py MODE [DIRECTORY…] FD`.

`listen` reads; `compute` never stops computing behind the first text; `die` ends at the first text;
`offer` hands over the directories, one for each answer; `back` takes the first of them back.
"""

import json
import socket
import sys
from typing import Any


def main() -> None:
    """See the module."""
    mode, *directories, descriptor = sys.argv[1:]
    sock = socket.socket(fileno=int(descriptor))
    lines = sock.makefile("r")

    def say(**message: Any) -> None:
        sock.sendall(json.dumps(message).encode() + b"\n")

    number = json.loads(lines.readline())["number"]
    say(op="progress", busy=True, steps=1, seconds=0.5)
    for line in lines:
        message = json.loads(line)
        if mode == "die":
            sys.exit(1)
        while mode == "compute":
            sum(range(1000))
        if mode == "back" and not directories:
            say(op="rollback")
            mode = "listen"
        elif mode in ("offer", "back") and directories:
            say(op="compared", better=True, live=1.0, candidate=2.0)
            number += 1
            say(op="candidate", number=number, path=directories.pop(0))
        assert message["op"] in ("text", "live")


if __name__ == "__main__":
    main()
