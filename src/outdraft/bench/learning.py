"""What learning while serving costs requests: two servers, asked in turn, behind equal pauses.

In the pauses of the one that learns its learner runs, and is stopped by the request that ends the
pause; in those of the other it is held still from here, so that the machine is idle. Here: the
requests and the figures. Not here: the servers, options and the table (cli/bench_serve.py).
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from outdraft.bench.serve import PATIENCE_S, Connection
from outdraft.bench.throughput import Asked
from outdraft.errors import OutdraftError

OFF, ON = "off", "on"
LEARNER = "outdraft.train.learner"
_CLOCK_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: from sending it to its first text, and from there to its end, by pass.

    `learned_s`: processor time of the learner in the pause before it.
    """

    where: str
    round: int
    first_ms: float
    pass_ms: float
    total_ms: float
    learned_s: float = 0.0


class Timed(Connection):
    """A connection that knows when the first text came, and how many drafts were accepted."""

    first_at = 0.0
    n_accepted = 0

    def _hear(self, chunk: dict[str, Any]) -> None:
        if not self.texts and chunk["choices"]:
            self.first_at = time.perf_counter()
        if chunk.get("usage"):
            details = chunk["usage"]["completion_tokens_details"]
            self.n_accepted = details["accepted_prediction_tokens"]
        super()._hear(chunk)


def ask_once(connection: Timed, where: str, round: int, asked: Asked) -> Answer:
    """One request on its own."""
    connection.socket.settimeout(PATIENCE_S)
    start = time.perf_counter()
    connection.ask(round, asked)
    while not connection.read():
        pass
    end = time.perf_counter()
    n_passes = max(1, connection.n_tokens - connection.n_accepted - 1)
    first, decode = connection.first_at - start, end - connection.first_at
    return Answer(where, round, 1e3 * first, 1e3 * decode / n_passes, 1e3 * (end - start))


def find_learner(root: int) -> int:
    """The learner's process below process `root`.

    Raises:
        OutdraftError: there is none, or no /proc.
    """
    parents, learners = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if LEARNER in (path / "cmdline").read_text():
                learners.append(int(path.name))
        except OSError:  # it has ended
            continue
    for pid in learners:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root:
            return pid
    raise OutdraftError("the learner does not run", "give more --requests")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(numbers[11]) + int(numbers[12])) / _CLOCK_HZ


def measure(
    ports: dict[str, int], learner: int, requests: Sequence[Asked], pause_s: float
) -> list[Answer]:
    """Each request of each server, who is first in turn."""
    answers = []
    connections = {where: Timed(port) for where, port in ports.items()}
    try:
        for i, asked in enumerate(requests):
            for where in (OFF, ON) if i % 2 else (ON, OFF):
                os.kill(learner, signal.SIGCONT if where == ON else signal.SIGSTOP)
                before_s = cpu_seconds(learner)
                time.sleep(pause_s)
                ran_s = cpu_seconds(learner) - before_s
                answer = ask_once(connections[where], where, i, asked)
                answers.append(replace(answer, learned_s=ran_s))
    finally:
        for connection in connections.values():
            connection.socket.close()
    return answers


def while_learning(answers: Sequence[Answer], pause_s: float) -> list[Answer]:
    """Of the rounds in which the learner computed for at least half of its pause."""
    rounds = {a.round for a in answers if a.where == ON and a.learned_s >= pause_s / 2}
    return [a for a in answers if a.round in rounds]


def summarise(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """By what is measured: medians of both, the median ratio of pairs and its quartiles."""
    rows = []
    for name in ("first_ms", "pass_ms", "total_ms"):
        values = {
            where: {a.round: getattr(a, name) for a in answers if a.where == where}
            for where in (OFF, ON)
        }
        ratios = [values[ON][i] / values[OFF][i] for i in values[OFF]]
        quarters = quantiles(ratios, n=4)
        off, on = (median(values[where].values()) for where in (OFF, ON))
        rows.append(
            {
                "what": name,
                "off": off,
                "on": on,
                "ratio_of_medians": on / off,
                "ratio": median(ratios),
                "ratio_quartiles": [quarters[0], quarters[2]],
            }
        )
    return rows
