"""From a request's options to the state that its sampling needs.

Here: what depends on the model's tokenizer: bad words as tokens, grammars, reasoning markers. Not
here: what the state does (sampling/state.py).
"""

import threading

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams
from outdraft.sampling.grammar import Grammars
from outdraft.sampling.state import SamplerState, ThinkingMarkers, needs_state
from outdraft.text.tokenizer import Tokenizer

MARKERS = (("<|channel>", "<channel|>"), ("<think>", "</think>"))
"""What opens and closes a reasoning block: Gemma 4's channels; Qwen, DeepSeek and others."""


class Samplers:
    """Makes the state of each request; any thread may ask.

    Args:
        tokenizer: the model's.
        vocab: ids that the model scores.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokenizer = tokenizer
        self.vocab = vocab
        self.markers = find_markers(tokenizer)
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def start(
        self, params: SamplingParams, prompt_tokens: tuple[int, ...], end_ids: frozenset[int]
    ) -> SamplerState | None:
        """The state behind a prompt; None where temperature and filters are all.

        Raises:
            SamplingError: an option cannot be met by this model, or a grammar is not valid.
        """
        ids = {t for t, _ in params.bias_pairs} | {
            t for word in params.bad_words if not isinstance(word, str) for t in word
        }
        outside = next((t for t in sorted(ids) if not 0 <= t < self.vocab), None)
        if outside is not None:
            raise SamplingError(
                f"token id {outside} is outside the vocabulary of {self.vocab}",
                "use ids of this model's tokenizer in logit_bias and bad_words",
            )
        if not needs_state(params):
            return None
        if params.max_thinking_tokens is not None and self.markers is None:
            raise SamplingError(
                "max_thinking_tokens is given and the model has no reasoning markers",
                f"leave it out; known are {' and '.join(a for a, _ in MARKERS)}",
            )
        grammar = None
        if params.grammar_options:
            grammar = self._compiler(params).start(params)
        return SamplerState(
            params,
            prompt_tokens,
            end_ids=frozenset(t for t in end_ids if t < self.vocab),
            bad_words=self._bad_words(params),
            grammar=grammar,
            markers=self.markers,
        )

    def _compiler(self, params: SamplingParams) -> Grammars:
        if not self.tokenizer.eos_ids:
            raise SamplingError(
                f"{params.grammar_options[0]} is given and the model has no end of sequence",
                "add eos_token_id to generation_config.json",
            )
        with self._lock:
            if self._grammars is None:
                eos_ids = sorted(self.tokenizer.eos_ids)
                self._grammars = Grammars(self.tokenizer.to_json(), self.vocab, eos_ids)
            return self._grammars

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """A text is two sequences where a space in front changes its tokens, as in vLLM."""
        words: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            texts = [word, f" {word.lstrip()}"] if isinstance(word, str) else []
            for text in texts:
                words[tuple(self.tokenizer.encode(text, add_special_tokens=False))] = None
            if not isinstance(word, str):
                words[word] = None
        return tuple(w for w in words if w)


def find_markers(tokenizer: Tokenizer) -> ThinkingMarkers | None:
    """The reasoning markers of a vocabulary, if it has both."""
    for opening, closing in MARKERS:
        open_id, close_id = tokenizer.token_to_id(opening), tokenizer.token_to_id(closing)
        if open_id is not None and close_id is not None:
            return ThinkingMarkers(open_id, close_id)
    return None
