"""transformers as a peer: the same weights, prompts and type through its plain and assisted loops.

The only place that imports transformers. Its release 5.23.0 cannot run this drafter: the property
`Gemma4TextConfig.kv_sharing_modes` raises for a model all of whose layers read another's keys, so
an assistant cannot be built, and it marks no layer as shared in a target whose layers all own
theirs, so the assistant gets nothing to read. `repair` replaces the property by what the rest of
the library expects of it; nothing else is touched.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from outdraft import _core
from outdraft.bench.peers.weights import assistant_state, target_state
from outdraft.bench.run import Arm, Measurement, Peer
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target
from outdraft.request import SamplingParams
from outdraft.weights.config import read_config

NAME = "transformers"
PLAIN, ASSISTED = "transformers plain", "transformers assisted"
NOT_CONFIG = ("architectures", "quantization_config", "transformers_version")


class Clock:
    """A streamer that notes when tokens arrive (transformers' `BaseStreamer`)."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, _tokens: torch.Tensor) -> None:
        """Called with the prompt, then with every block of new tokens."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last."""


def build_peer(target: Target, assistant: Path, k: int) -> Peer:
    """transformers, plain and assisted, with the weights of our target and assistant.

    Args:
        k: tokens drafted a step.

    Raises:
        OutdraftError: transformers is not installed or has no Gemma 4.
    """
    try:
        import transformers
        from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM
    except ImportError as error:
        raise OutdraftError(
            f"transformers cannot be used as a peer: {error}",
            "install the version that was measured: pip install transformers==5.23.0",
        ) from error
    repair()
    model = build(Gemma4ForCausalLM, _target_config(target.path), target_state(target))
    drafter = build(
        Gemma4AssistantForCausalLM,
        _assistant_config(assistant),
        assistant_state(assistant, target.dtype),
    )
    model.to(target.ops.device)
    drafter.to(target.ops.device)
    drafter.generation_config.num_assistant_tokens = k
    arms = [Arm(PLAIN, _measure(model, None)), Arm(ASSISTED, _measure(model, drafter))]
    return Peer(arms, {"name": NAME, "version": str(transformers.__version__), "patched": True})


def repair() -> None:
    """Replace the broken property; see the module's docstring."""
    from transformers import Gemma4TextConfig

    Gemma4TextConfig.kv_sharing_modes = property(sharing_modes)


def sharing_modes(config: Any) -> list[str | None]:
    """For each layer: "reuse" reads another's keys, "store" leaves its own for readers, or None.

    The last owning layer of each kind stores, whether or not a later layer of the same model reads
    it: an assistant does.
    """
    n_own = config.num_hidden_layers - config.num_kv_shared_layers
    modes: list[str | None] = [
        None if i < n_own else "reuse" for i in range(len(config.layer_types))
    ]
    last = {kind: i for i, kind in enumerate(config.layer_types[:n_own])}
    for layer in last.values():
        modes[layer] = "store"
    return modes


def build(family: Any, config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A model of transformers with these weights; buffers that it computes stay fp32."""
    model = family(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0  # all answers of equal length
    generation.do_sample = False
    return model


def _measure(model: Any, assistant: Any) -> Any:
    @torch.inference_mode()
    def measure(tokens: Sequence[int], params: SamplingParams) -> Measurement:
        assert params.greedy, "transformers' assisted sampling is not lossless"
        ids = torch.tensor([list(tokens)], device=model.device)
        clock = Clock()
        ours = torch.get_num_threads()  # 1 while our kernels have the processor
        torch.set_num_threads(max(ours, _core.threads()))
        try:
            start = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_tokens,
                assistant_model=assistant,
                streamer=clock,
            )
        finally:
            torch.set_num_threads(ours)
        first, last = clock.times_s[1], clock.times_s[-1]
        return Measurement(out[0, len(tokens) :].tolist(), first - start, last - first)

    return measure


def _target_config(path: Path) -> Any:
    from transformers import Gemma4TextConfig

    raw = read_config(path)
    return Gemma4TextConfig(**_cleaned(raw.get("text_config", raw)))


def _assistant_config(path: Path) -> Any:
    from transformers import Gemma4AssistantConfig

    return Gemma4AssistantConfig(**_cleaned(read_config(path)))


def _cleaned(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in NOT_CONFIG}
