"""The native head of Qwen 3.5 against transformers' `MtpModel`, logits of every row and round."""

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import MtpModel

from outdraft.models import mtp, qwen3_5
from outdraft.models.mtp import MtpHead
from outdraft.models.qwen3_5 import Qwen35
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.ops.batched import BatchedOps
from outdraft.ops.reference import ReferenceOps
from outdraft.train.native import States, round_results
from tests import tiny
from tests.models.parity import TOLERANCE

NAMES = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
N = 40
RENAMED = {
    "pre_fc_norm_embedding.": "enorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "fc.": "eh_proj.",
    "norm.": "post_norm.",
}


def theirs_of(shape: str, raw: dict[str, object], head: dict[str, Tensor]) -> MtpModel:
    """transformers' model of one layer with these weights; the embedding is the main model's."""
    config_class = getattr(transformers, f"{NAMES[shape]}TextConfig")
    # The kind of norm is taken from the main model's last layer: as published, that is attention.
    kinds = {"layer_types": ["full_attention"], "num_hidden_layers": 1}
    settings = {k: v for k, v in (raw | kinds).items() if k != "model_type"}
    config = config_class(**settings, num_mtp_layers=1, mtp_layer_types=["full_attention"])
    config._attn_implementation = "eager"
    main = getattr(transformers, f"{NAMES[shape]}ForCausalLM")(config).eval()
    made = MtpModel(main, 1).eval()
    state = {}
    for name, weight in head.items():
        renamed = next((b + name[len(a) :] for a, b in RENAMED.items() if name.startswith(a)), None)
        state[f"layers.0.{renamed or 'mtp_block.' + name.removeprefix('layers.0.')}"] = weight
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("embed_tokens", "shared_head", "rotary")) for name in missing)
    return made


@pytest.mark.parametrize("shape", NAMES)
def test_rows_are_those_of_transformers(shape: str) -> None:
    raw = tiny.target_config(shape, mtp_num_hidden_layers=1)
    config = Qwen35Config.from_hf(raw)
    weights = tiny.random_tensors(qwen3_5.expected_tensors(config), 3)
    head = tiny.random_tensors(mtp.expected_tensors(config), 4)
    theirs = theirs_of(shape, raw, head)
    generator = torch.Generator().manual_seed(6)
    tokens_S = torch.randint(6, tiny.VOCAB, (N + 1,), generator=generator)
    hidden_SK = torch.randn(N + 1, config.hidden_size, generator=generator)
    embedding = weights["embed_tokens.weight"]
    with torch.no_grad():
        want_SK = theirs.forward_layer(
            0,
            hidden_SK[None, :N],
            torch.arange(N)[None],
            None,
            inputs_embeds=embedding[tokens_S[1:]][None],
        )[0]
        states = States(embedding[tokens_S][None], hidden_SK[None], torch.zeros(1, N + 1, 1))
        got_SK = round_results(MtpHead(config, head, BatchedOps(), N + 1), states, 1)[0]
        logits = Qwen35(config, weights, ReferenceOps()).logits
        want, got = logits(want_SK), logits(got_SK)
    spread = float(want.max() - want.min())
    assert float((got - want).abs().max()) <= TOLERANCE * spread
