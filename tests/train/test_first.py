"""A new assistant's sizes and first weights, against the properties they are chosen for."""

import json
from pathlib import Path

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.models.gemma4_assistant import check_pair, expected_tensors
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.train.first import first_weights
from outdraft.train.pretrain import run_target
from outdraft.train.propose import propose_assistant
from outdraft.train.served import served_target
from tests import tiny


@pytest.mark.parametrize("shape", ["plain", "dense", "e2b", "window"])
def test_a_proposal_fits_its_target(shape: str) -> None:
    raw = tiny.target_config(shape)
    for config in (raw, {"model_type": "gemma4", "text_config": raw}):
        proposal = propose_assistant(config)
        check_pair(Gemma4Config.from_hf(raw), proposal.shape)
        assert len(proposal.reasons) == 4
        assert proposal.shape.text.layer_types == tuple(
            tiny.assistant_config(raw)["text_config"]["layer_types"]
        )


@pytest.mark.parametrize(
    "hidden,n_kv,expected", [(512, 2, (128, 4)), (5376, 8, (1024, 8)), (1536, 1, (384, 4))]
)
def test_sizes(hidden: int, n_kv: int, expected: tuple[int, int]) -> None:
    raw = tiny.target_config(hidden_size=hidden, num_key_value_heads=n_kv, num_attention_heads=8)
    text = propose_assistant(raw).config["text_config"]
    assert (text["hidden_size"], text["num_attention_heads"]) == expected


def test_targets_of_one_kind_of_layer() -> None:
    raw = tiny.target_config(layer_types=[tiny.F] * 4)
    assert set(propose_assistant(raw).shape.text.layer_types) == {tiny.F}


def test_first_weights_are_the_best_linear_guess(tmp_path: Path) -> None:
    path = tiny.tiny_target(tmp_path / "target")
    raw = json.loads((path / "config.json").read_text())
    shape = propose_assistant(raw).shape
    target = served_target(path, EngineConfig(device="cpu"))
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(6, 500, (40, 60), generator=generator)
    weights = first_weights(target, shape, texts.tolist(), 0)
    assert {n: t.shape for n, t in weights.items()} == {
        n: torch.Size(t.shape) for n, t in expected_tensors(shape).items()
    }
    with torch.no_grad():
        states, _ = run_target(target, texts)
        hidden = states.view(40, 60, -1).double()
        embedded = target.embed(texts).double()
    rows = hidden[:, 1:].flatten(0, 1)
    head = target.head.double()
    ours, back = weights["embed_tokens.weight"].double(), weights["post_projection.weight"].double()
    moment = rows.T @ rows / len(rows)
    # Own states: unit second moment, so that a norm leaves them as they are on average.
    forth = back.T @ torch.linalg.inv(moment)
    own = rows @ forth.T
    assert torch.allclose(own.T @ own / len(own), torch.eye(32).double(), atol=0.05)
    # Scores: no worse than the leading directions of the head alone, and far from random ones.
    scores = rows @ head.T
    error = float((own @ ours.T - scores).norm() / scores.norm())
    _, leading = torch.linalg.eigh(head.T @ head)
    random = torch.linalg.qr(torch.randn(64, 32, generator=generator).double())[0]
    others = [
        float((rows @ p @ p.T @ head.T - scores).norm() / scores.norm())
        for p in (leading[:, -32:], random)
    ]
    assert error < others[0] + 1e-3 and error < 0.8 * others[1], (error, others)
    # The input projection: what is left after it does not depend on what was read.
    inputs = torch.cat((embedded[:, 1:], hidden[:, :-1]), dim=-1).flatten(0, 1)
    guess = inputs @ weights["pre_projection.weight"].double().T
    left = own - guess
    spread = inputs.norm(dim=0)[:, None] * left.norm(dim=0)
    assert float((inputs.T @ left / spread).abs().max()) < 0.05
    assert float(left.norm()) < 0.9 * float(own.norm())
