"""The engine and the Python API: load a model, add requests, run steps, read events.

Here: `LLM`. Not here: what a step does (runner.py) and who is in it (scheduler.py).
"""

import itertools
import secrets
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from outdraft.config import EngineConfig
from outdraft.engine.costs import Bench, measure_costs
from outdraft.engine.fit import build_memory
from outdraft.engine.graphs import TargetPass
from outdraft.engine.learned import begin_learning
from outdraft.engine.lengths import AutoLengths
from outdraft.engine.options import Samplers
from outdraft.engine.runner import Runner
from outdraft.engine.scheduler import Scheduler
from outdraft.engine.sequence import Sequence, check_prompt
from outdraft.engine.stats import EngineStats, snapshot
from outdraft.engine.whole import measure_steps, works_beside
from outdraft.errors import OutdraftError, PromptError, SamplingError
from outdraft.models.registry import load_target
from outdraft.ops.reference import ReferenceOps
from outdraft.request import FinishReason, Logprobs, Request, SamplingParams, TokenEvent
from outdraft.speculate.build import build_drafter
from outdraft.speculate.stats import DraftStats, StepTimes
from outdraft.text.chat import ChatTemplate
from outdraft.text.stream import IncrementalDetokenizer, StopStrings
from outdraft.text.tokenizer import Tokenizer
from outdraft.weights.find import resolve_model
from outdraft.weights.loading import Loading


@dataclass(slots=True)
class Completion:
    """What one request produced. Times are seconds: `prefill_s` up to the first token.

    `cached_tokens` of the prompt came from the prefix cache and were not computed.
    `logprobs` and `prompt_logprobs` are by token, and empty unless asked for; the first token of a
    prompt has none.
    """

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    stats: DraftStats = field(default_factory=DraftStats)
    times: StepTimes = field(default_factory=StepTimes)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)

    @property
    def timings(self) -> dict[str, float | int]:
        """The same under llama.cpp's names; rates per second, times in milliseconds."""
        n_decoded = max(0, len(self.tokens) - 1)  # the first token belongs to the prompt's pass
        return {
            "prompt_n": len(self.prompt_tokens) - self.cached_tokens,
            "cache_n": self.cached_tokens,
            "prompt_ms": self.prefill_s * 1e3,
            "prompt_per_second": _rate(
                len(self.prompt_tokens) - self.cached_tokens, self.prefill_s
            ),
            "predicted_n": len(self.tokens),
            "predicted_ms": self.decode_s * 1e3,
            "predicted_per_second": _rate(n_decoded, self.decode_s),
            "draft_n": self.stats.n_drafted,
            "draft_n_accepted": self.stats.n_accepted,
        }


class LLM:
    """A model that generates, drafting when it has a drafter.

    >>> with LLM("demo") as llm:
    ...     print(llm.generate("def add(a, b):", SamplingParams(max_tokens=32)).text)

    Args:
        model: `demo`, a directory, or a Hugging Face id that has been downloaded.
        config: how to load and run it.
        loading: told how far loading is, and what went otherwise than expected.

    Raises:
        ModelError: the model, or a drafter that was asked for, cannot be used.
    """

    def __init__(
        self, model: str, config: EngineConfig | None = None, loading: Loading | None = None
    ) -> None:
        self.config = config or EngineConfig()
        path = resolve_model(model)
        self.loading = loading or Loading()
        self.target = load_target(path, self.config, self.loading)
        self.pairing = build_drafter(self.target, self.config, TargetPass, self.loading)
        self.tokenizer = Tokenizer.load(path)
        self.template = ChatTemplate.load(path)
        self.samplers = Samplers(self.tokenizer, self.target.config.vocab_size)
        self.ctx_size = self.target.ctx_size
        max_rows = max(self.config.prefill_chunk, self.pairing.n_draft_max + 1)
        self.memory = build_memory(self.target, self.config, max_rows, self.pairing.n_draft_max)
        self.runner = Runner(self.target, self.pairing.drafter, self.memory)
        self.runner.p_min = self.config.draft_p_min
        self.scheduler = Scheduler(
            books=self.memory.books,
            max_queue=self.config.max_queue,
            max_sequences=self.config.max_sequences,
            prefill_chunk=self.config.prefill_chunk,
            n_draft_max=self.pairing.n_draft_max,
        )
        self._ids = itertools.count()
        self.learning = begin_learning(self.target, self.pairing, self.config, self.loading)
        weakref.finalize(self, self.learning.close)
        self.lengths: AutoLengths | None = None
        if self.pairing.drafter is not None and self.config.draft_n is None:
            self.set_draft_auto()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        for sequence_id in [*self.scheduler.running, *(s.id for s in self.scheduler.waiting)]:
            self.abort(sequence_id)
        self.learning.close()

    def describe(self) -> str:
        """What computes, and in which types, in a few words for people."""
        ops = self.target.ops
        if not isinstance(ops, ReferenceOps):
            return ops.describe()
        return f"{ops.describe()}, {str(self.target.dtype).removeprefix('torch.')}"

    def set_draft_n_max(self, k: int) -> None:
        """Draft k tokens a step from the next step on, always; 0 decodes plainly.

        Raises:
            OutdraftError: there is no drafter, or k is more than memory was planned for.
        """
        if not 0 <= k <= self.pairing.n_draft_max:
            raise OutdraftError(
                f"draft length {k} is not possible here",
                f"use 0 to {self.pairing.n_draft_max} ({self.pairing.reason})",
            )
        self.scheduler.n_draft_max = k
        self.scheduler.draft_lengths = lambda decoding: [k] * len(decoding)
        self.runner.lengths = None

    def set_draft_auto(self) -> None:
        """Choose draft lengths by measured costs and acceptance, from the next step on.

        Costs are measured at the first call, in about half a second, if nothing is in progress, and
        again if steps since then say that the machine was busy meanwhile.

        Raises:
            OutdraftError: there is no drafter.
        """
        drafter, k = self.pairing.drafter, self.pairing.n_draft_max
        if drafter is None:
            raise OutdraftError("no draft length can be chosen", self.pairing.reason)
        first = self.lengths is None
        if self.lengths is None:
            self.lengths = AutoLengths(k, sample_drafts=self.config.sample_drafts, drafter=drafter)
        if not self.scheduler.busy and (first or self.lengths.mismeasured):
            bench = Bench(self.target, self.runner.target_pass, drafter, self.memory)
            measure_costs(self.lengths, bench, k, self.config.max_sequences)
            if works_beside(self.target.ops):
                measure_steps(self, self.lengths)
        self.scheduler.n_draft_max = k
        self.scheduler.draft_lengths = self.lengths.choose
        self.runner.lengths = self.lengths

    def encode(self, prompt: str | Seq[int]) -> tuple[int, ...]:
        """Token ids of a prompt: text gets `<bos>`, ids are taken as they are."""
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty", "give some text")
            return tuple(self.tokenizer.encode(prompt))
        return tuple(prompt)

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[int, ...]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            PromptError: the model has no template, or the template refuses the messages.
        """
        if self.template is None:
            raise PromptError(
                f"{self.target.path} has no chat template", "use `generate` with plain text"
            )
        return tuple(self.tokenizer.encode(self.template.render(messages, **options)))

    def prepare(
        self,
        prompt: str | Seq[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        draft_n_max: int | None = None,
        store: bool = True,
    ) -> Sequence:
        """A request that can be queued. It touches nothing of the engine: any thread may call it.

        Raises:
            PromptError: the prompt cannot be run.
            SamplingError: the model cannot meet an option, or n is not 1.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise SamplingError(f"n is {params.n}", "use generate_all, which returns n completions")
        prompt_tokens = self.encode(prompt)
        check_prompt(prompt_tokens, self.target.config.vocab_size, self.ctx_size)
        name = f"r{next(self._ids)}"
        request = Request(name, prompt_tokens, params, cache_salt, draft_n_max, store)
        limit = self.ctx_size
        if params.max_tokens is not None:
            limit = min(limit, len(prompt_tokens) + params.max_tokens)
        end_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= set(self.tokenizer.eos_ids)
        return Sequence(
            request=request,
            seed=secrets.randbits(62) if params.seed is None else params.seed,
            limit=limit,
            end_ids=frozenset(end_ids),
            detokenizer=IncrementalDetokenizer(
                self.tokenizer, list(prompt_tokens), frozenset(params.show_token_ids)
            ),
            stop_strings=StopStrings(params.stop),
            tokens=list(prompt_tokens),
            sampler=self.samplers.start(params, prompt_tokens, frozenset(end_ids)),
        )

    def add(
        self,
        prompt: str | Seq[int],
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
    ) -> Sequence:
        """Queue a request; its events come out of `step`.

        Args:
            cache_salt: requests with different salts share no cached keys and values.

        Raises:
            PromptError: the prompt cannot be run.
            QueueFull: too many requests wait.
        """
        sequence = self.prepare(prompt, params, cache_salt=cache_salt)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[TokenEvent]:
        """Run one step of everything in progress; [] when there is nothing to do."""
        self.learning.pause()
        events = []
        while (admitted := self.scheduler.admit_next()) is not None:
            try:
                self.runner.open(admitted)
            except Exception as error:
                self.scheduler.remove(admitted.id)
                events.append(admitted.abort(FinishReason.ERROR, f"{error}"))
                self.runner.counters.end(admitted)
        running = self.scheduler.running
        if not running:
            self.learning.rest(busy=self.scheduler.busy)
            return events
        plan = self.scheduler.plan()
        for sequence_id in plan.preempted:
            self.runner.forget(sequence_id)
        events += self.runner.execute(plan, running)
        for sequence in [s for s in running.values() if s.finish_reason is not None]:
            self.scheduler.remove(sequence.id)
            self.runner.close(sequence)
            self.runner.counters.end(sequence)
            self.learning.observe(sequence)
        if not self.scheduler.busy:
            self.scheduler.check()
        self.learning.rest(busy=self.scheduler.busy)
        return events

    def stats(self) -> EngineStats:
        """Who is in progress, memory, the prefix cache, what drafting gains. Any thread may ask."""
        drafter, lengths = self.pairing.drafter, self.runner.lengths
        return snapshot(
            self.scheduler,
            self.runner.counters,
            self.runner.faults,
            drafter=None if drafter is None else drafter.name,
            reason=self.pairing.reason,
            chosen=lengths is not None,
            speed_up=None if lengths is None else lengths.speed_up,
            learn=self.learning.stats(),
        )

    def check(self) -> None:
        """Compare all books: every page free, cached or used by who runs; nothing left behind.

        Raises:
            AssertionError: they disagree, which is an error of this program.
        """
        self.scheduler.check()
        assert self.runner.hidden.keys() <= self.scheduler.running.keys(), "state of who has ended"

    def abort(self, sequence_id: str) -> TokenEvent | None:
        """End a request now; its last event, or None if it is not in progress."""
        was_running = sequence_id in self.scheduler.running
        sequence = self.scheduler.remove(sequence_id)
        if sequence is None:
            return None
        if was_running:
            self.runner.close(sequence)
        event = sequence.abort(FinishReason.ABORT)
        self.runner.counters.end(sequence)
        self.learning.rest(busy=self.scheduler.busy)
        return event

    def stream(
        self, prompt: str | Seq[int], params: SamplingParams | None = None
    ) -> Iterator[TokenEvent]:
        """Events of one request as they come. Closing the iterator aborts the request."""
        sequence = self.add(prompt, params)
        try:
            while sequence.finish_reason is None:
                yield from (e for e in self.step() if e.request_id == sequence.id)
        finally:
            self.abort(sequence.id)

    def generate(self, prompt: str | Seq[int], params: SamplingParams | None = None) -> Completion:
        """Run one request to its end; `n` is 1."""
        if params is not None and params.n != 1:
            raise SamplingError(f"n is {params.n}", "use generate_all, which returns n completions")
        return self.generate_all([prompt], params)[0]

    def generate_all(
        self,
        prompts: Seq[str | Seq[int]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Run many requests, as many at once as `max_sequences` allows; results in their order.

        Where `n` is above 1, the n completions of a prompt follow one another.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        sequences = [
            self.add(p, one) for p, q in zip(prompts, params, strict=True) for one in _each(q)
        ]
        texts: dict[str, list[str]] = {s.id: [] for s in sequences}
        while any(s.finish_reason is None for s in sequences):
            for event in self.step():
                if event.request_id in texts:
                    texts[event.request_id].append(event.text)
        return [completion_of(s, "".join(texts[s.id])) for s in sequences]

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None
    ) -> Completion:
        """Answer a conversation (`[{"role": "user", "content": …}, …]`)."""
        return self.generate(self.render_chat(messages), params)


def completion_of(sequence: Sequence, text: str) -> Completion:
    """The result of a sequence so far, with the text that its events carried."""
    return Completion(
        prompt_tokens=list(sequence.request.prompt_tokens),
        tokens=sequence.output,
        text=text,
        finish_reason=sequence.finish_reason,
        error=sequence.error,
        cached_tokens=sequence.n_cached,
        stats=replace(sequence.stats),
        times=replace(sequence.times),
        prefill_s=sequence.prefill_s,
        decode_s=sequence.decode_s,
        logprobs=list(sequence.logprobs),
        prompt_logprobs=list(sequence.prompt_logprobs),
    )


def _each(params: SamplingParams) -> list[SamplingParams]:
    if params.n == 1:
        return [params]
    return params.split(secrets.randbits(62) if params.seed is None else params.seed)


def _rate(n: int, seconds: float) -> float:
    return n / seconds if seconds > 0 else 0.0
