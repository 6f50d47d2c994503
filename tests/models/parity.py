"""What every family's parity test does: our logits against transformers', whole and with a cache.

Not a test itself. Shapes: T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from outdraft.cache.attend import CausalCall
from outdraft.cache.memory import LayerMemory, Memory, Span
from outdraft.models.layers import TargetModel
from tests import tiny

N_TOKENS = 150
TOLERANCE = 1e-4
Build = Callable[[], tuple[TargetModel, Memory]]


def memory_of(layers: list[LayerMemory]) -> Memory:
    """Of one sequence, "s"."""
    memory = Memory(layers, max_sequences=1, max_tokens=256, max_rows=160, dtype=torch.float32)
    memory.open("s")
    return memory


def run(model: TargetModel, memory: Memory, tokens: list[int]) -> Tensor:
    """Logits [T, V] of the next tokens of the one sequence "s"."""
    memory.reserve("s", len(tokens))
    call = CausalCall.prepare(memory, model.ops, [Span("s", 0, len(tokens))], tokens)
    hidden = model.forward(call.token_T, call.position_T, call.attend)
    memory.advance("s", len(tokens))
    memory.trim("s")
    return model.logits(hidden)


def assert_parity(theirs: Any, build: Build) -> None:
    """A prompt and twelve single tokens; ours at once and in the same parts, those bit for bit."""
    tokens = torch.randint(6, tiny.VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(4))
    cache = DynamicCache(config=theirs.config)
    split = N_TOKENS - 12
    expected = [theirs(tokens[None, :split], past_key_values=cache).logits[0]]
    for token in tokens[split:]:
        expected.append(theirs(token.view(1, 1), past_key_values=cache).logits[0])
    want = torch.cat(expected)
    spread = float(want.max() - want.min())

    whole = run(*build(), tokens.tolist())
    assert float((whole - want).abs().max()) <= TOLERANCE * spread

    model, memory = build()
    parts = [run(model, memory, tokens[:split].tolist())]
    parts += [run(model, memory, [int(token)]) for token in tokens[split:]]
    assert torch.equal(torch.cat(parts), whole)
