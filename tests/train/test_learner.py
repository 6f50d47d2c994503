"""The learner's process, without the process: replays, the loss, the gate, going back."""

import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outdraft import LLM, EngineConfig, SamplingParams
from outdraft.engine.learned import begin_learning, kept
from outdraft.engine.learning import Learning
from outdraft.engine.replay import ServedText
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.ops.batched import BatchedOps
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.train import learner as learning_process
from outdraft.train.learner import Learner
from outdraft.train.live import MAX_OUTPUT, MAX_TOKENS, Piece, opened, piece_loss, pieces, replayed
from outdraft.train.optimiser import OptimiserConfig
from outdraft.train.replay import HELDOUT_PART, LEAST, Split, is_heldout
from outdraft.train.served import assistant_leaves
from outdraft.train.tuning import Texts, Tuning
from outdraft.train.weights import make_trainable
from outdraft.weights.find import DEMO_DIRECTORY
from tests import tiny

N_DRAFT = 3
DEMO = DEMO_DIRECTORY / "target", DEMO_DIRECTORY / "assistant"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    target = tiny.tiny_target(root / "target", "window")
    return target, tiny.tiny_assistant(root / "stock", target)


@pytest.fixture(scope="module")
def served(pair: tuple[Path, Path]) -> list[tuple[list[int], int]]:
    """What the target wrote after random prompts, greedily."""
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(6, 260, (100, 5), generator=generator).tolist()
    with LLM(str(pair[0]), EngineConfig(spec_type="off")) as llm:
        done = llm.generate_all(
            [[2, *p] for p in prompts], SamplingParams(max_tokens=40, ignore_eos=True)
        )
    return [([*c.prompt_tokens, *c.tokens], len(c.prompt_tokens)) for c in done]


def order(pair: tuple[Path, Path], directory: Path, **changes: Any) -> dict[str, Any]:
    """The first message, as the engine would send it."""
    config = EngineConfig(assistant=str(pair[1]), draft_n=N_DRAFT, learn=True, **changes)
    with LLM(str(pair[0]), replace(config, learn=False, learn_dir=None)) as llm:
        own = begin_learning(llm.target, llm.pairing, config, llm.loading)
        assert isinstance(own, Learning)
        own.close()
    drafters = {"live": own.order["stock"], "previous": own.order["stock"], "number": 0}
    return json.loads(json.dumps(own.order)) | drafters | {"directory": str(directory)}


@pytest.fixture
def learner(pair: tuple[Path, Path], tmp_path: Path) -> Iterator[Learner]:
    own = Learner(order(pair, tmp_path))
    yield own
    own.llm.__exit__()


@pytest.fixture(scope="module")
def demo_texts() -> list[tuple[list[int], int]]:
    """What the demo wrote; its drafter guesses most of it."""
    names = [f"{a}{b}" for a in "abcdefghij" for b in ("row", "box", "key", "map", "set", "use")]
    prompts = [f"def {name}_{len(name)}(self, {name}s):\n" for name in names]
    with LLM("demo", EngineConfig(spec_type="off")) as llm:
        done = llm.generate_all(prompts, SamplingParams(max_tokens=32, ignore_eos=True))
    return [([*c.prompt_tokens, *c.tokens], len(c.prompt_tokens)) for c in done]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Learner]:
    own = Learner(order(DEMO, tmp_path))
    yield own
    own.llm.__exit__()


def tell(learner: Learner, texts: list[tuple[list[int], int]]) -> None:
    for tokens, n_prompt in texts:
        learner.hear({"op": "text", "tokens": tokens, "n_prompt": n_prompt, "version": 0})


def work(learner: Learner, most: int = 5000) -> list[dict[str, Any]]:
    """Until there is nothing to do; what was said but progress."""
    for _ in range(most):
        if not learner.busy:
            break
        learner.work()
    said = [m for m in learner.outgoing if m["op"] != "progress"]
    learner.outgoing.clear()
    return said


def test_no_written_token_is_lost_or_in_two_pieces() -> None:
    for n_prompt, n in ((3, 11), (900, 1700), (40, 40 + 3 * MAX_OUTPUT), (5000, 5001)):
        text = [7, *range(100, 99 + n)]
        found = pieces(text, n_prompt)
        assert [t for p in found for t in p.tokens[p.given :]] == text[n_prompt:]
        for piece in found:
            assert len(piece.tokens) <= MAX_TOKENS and piece.tokens[0] == 7 and piece.given > 0
            end = text.index(piece.tokens[-1]) + 1
            assert list(piece.tokens[1:]) == text[end - len(piece.tokens) + 1 : end]


def test_sides_never_mix_and_old_texts_go() -> None:
    split = Split(max_bytes=6000)
    generator = torch.Generator().manual_seed(1)
    for i in range(200):
        prompt = torch.randint(0, 500, (4,), generator=generator).tolist()
        for seed in range(2):
            split.add(ServedText(array("i", [*prompt, *range(seed, seed + 10 + i % 7)]), 4))
        assert sum(t.served.n_bytes for t in [*split.train, *split.heldout]) <= 6000
        for side, heldout in ((split.train, False), (split.heldout, True)):
            assert all(is_heldout(t.served.tokens[:4]) is heldout for t in side)
    sides = [is_heldout([i, 3 * i]) for i in range(2000)]
    assert 0.8 < sum(sides) * HELDOUT_PART / 2000 < 1.2


def test_hard_texts_are_drawn_more_often(served: list[tuple[list[int], int]]) -> None:
    split = Split(10**6)
    for tokens, n in served:
        split.add(ServedText(array("i", tokens), n))
    hard = split.train[3]
    for text in split.train:
        text.scores[0] = learning_process.DraftStats(n_passes=4 if text is hard else 1, n_emitted=4)
    drawn = split.draw(2000, torch.Generator().manual_seed(2))
    share = sum(p is hard.pieces[0] for p in drawn) / 2000
    expected = 4 / (len(split.train) + 3)
    assert 0.7 * expected < share < 1.3 * expected


@pytest.mark.parametrize("backend,n_texts", [("cpu", 6), ("reference", 2)])
def test_a_replay_is_what_decoding_did(backend: str, n_texts: int, tmp_path: Path) -> None:
    """As many passes, and the same drafts accepted, with the demo's drafter."""
    own = Learner(order(DEMO, tmp_path, backend=backend))
    config = EngineConfig(draft_n=N_DRAFT, backend=backend)  # type: ignore[arg-type]
    accepted = []
    with LLM("demo", config) as llm:
        for i in range(n_texts):
            prompt = f"class Box{i}:\n    def __init__(self, width"
            done = llm.generate(prompt, SamplingParams(max_tokens=61, ignore_eos=True))
            (piece,) = pieces([*done.prompt_tokens, *done.tokens], len(done.prompt_tokens))
            with opened(own.llm, piece) as states:
                found = replayed(states, own.live.drafter, N_DRAFT)
            # The first token is the prompt's pass's; at the end decoding drafts no further than
            # the limit, where a replay does.
            assert found.n_emitted == done.stats.n_emitted - 1
            assert found.n_passes == done.stats.n_passes - 1
            assert found.n_accepted - done.stats.n_accepted in (0, 1)
            accepted.append(found.n_accepted)
    own.llm.__exit__()
    assert min(accepted) > 15 and len(set(accepted)) > 1


def test_the_loss_is_that_of_tuning(
    pair: tuple[Path, Path], served: list[tuple[list[int], int]], tmp_path: Path
) -> None:
    learner = Learner(order(pair, tmp_path, backend="reference"))
    raw = json.loads((pair[0] / "config.json").read_text())
    target = Gemma4(Gemma4Config.from_hf(raw), tiny.target_weights(raw), BatchedOps())
    config, stock = assistant_leaves(pair[1])
    ours = make_trainable(stock, torch.device("cpu"))
    theirs = make_trainable(stock, torch.device("cpu"))
    tokens, given = served[0]
    tokens = tokens + served[1][0]  # past the window
    kv_layers = learner.live.drafter.kv_layers
    with opened(learner.llm, Piece(tuple(tokens), given)) as states:
        loss = piece_loss(states, learner.llm, config, ours, kv_layers, N_DRAFT)
    assert loss is not None
    tuning = Tuning(
        target,
        config,
        theirs,
        Texts.of([(tokens, given)]),
        batch=1,
        n_steps=N_DRAFT,
        loss="kl",
        seed=0,
        dtype=torch.float32,
    )
    expected = tuning.loss(0)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    for name, weight in tuning.weights.items():
        grad = ours[name].grad
        assert grad is not None and weight.grad is not None
        # Rounding of the states, a millionth, grows in a random network's own states.
        assert float((grad - weight.grad).norm()) < 0.03 * float(weight.grad.norm()), name
    learner.llm.__exit__()


def test_it_learns_and_hands_over_what_is_better(
    pair: tuple[Path, Path],
    served: list[tuple[list[int], int]],
    learner: Learner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learning_process, "STEPS", 40)
    monkeypatch.setattr(learning_process, "BATCH", 4)
    quick = OptimiserConfig(muon_lr=0.02, adam_lr=4e-3)  # from random weights
    monkeypatch.setattr(learning_process, "_OPTIMISER", quick)
    tell(learner, served)
    assert learner.busy
    said = work(learner)
    assert [m["op"] for m in said] == ["compared", "candidate"]
    assert said[0]["better"] and said[0]["candidate"] > said[0]["live"]
    assert not learner.busy  # it waits for the engine's answer
    path = Path(said[1]["path"])
    with LLM(str(pair[0]), EngineConfig(assistant=str(path), draft_n=N_DRAFT)) as llm:
        assert llm.generate([2, 9, 30], SamplingParams(max_tokens=9)).stats.n_drafted > 0
    learner.hear({"op": "live", "number": said[1]["number"]})
    assert learner.live.number == said[1]["number"] and learner.previous is not None
    assert learner.busy  # as it was of use, there is another round


def test_a_worse_drafter_is_refused(
    demo_texts: list[tuple[list[int], int]], demo: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(monkeypatch)
    tell(demo, demo_texts)
    said = work(demo)
    assert [m["op"] for m in said] == ["compared"]
    assert not said[0]["better"] and said[0]["candidate"] <= said[0]["live"]
    assert demo.live.number == 0 and not list(demo.directory.iterdir())
    assert demo.training is None  # the next round begins with the drafter in use
    assert not demo.busy


def test_nothing_new_nothing_done(
    served: list[tuple[list[int], int]], learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_process, "FRESH_TOKENS", 10**9)
    tell(learner, served)
    assert work(learner) == [] and not learner.busy


def test_what_turns_out_worse_goes_back(
    demo_texts: list[tuple[list[int], int]], demo: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad drafter that the gate let through: later texts tell."""
    with monkeypatch.context() as broken:
        ruin(broken)
        broken.setattr(learning_process, "is_better", lambda change: True)
        tell(demo, demo_texts[:44])
        number = work(demo)[1]["number"]
    demo.hear({"op": "live", "number": number})
    demo.again = False
    assert demo.live.number == number
    tell(demo, demo_texts[44:])
    said = work(demo)
    assert [m["op"] for m in said] == ["rollback"]
    assert len(demo.watched) == LEAST
    demo.hear({"op": "live", "number": 0})
    assert demo.live.number == 0 and demo.previous is None
    before = assistant_leaves(demo.stock)[1]
    assert all(torch.equal(demo.live.weights[name], t) for name, t in before.items())


def test_an_equal_drafter_stays(
    demo_texts: list[tuple[list[int], int]], demo: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_process, "FRESH_TOKENS", 10**9)
    demo.previous = replace(demo.live, number=-1)
    tell(demo, demo_texts)
    assert work(demo) == []


def test_drafters_are_kept_and_rolled_back_ones_are_not(
    pair: tuple[Path, Path],
    served: list[tuple[list[int], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learning_process, "STEPS", 1)
    monkeypatch.setattr(learning_process, "is_better", lambda change: change.tokens_per_pass < 99)
    work_place, folder = tmp_path / "work", tmp_path / "kept"
    work_place.mkdir()
    own = Learner(order(pair, work_place, learn_dir=str(folder)))
    tell(own, served)
    for number in (1, 2, 3):
        assert work(own)[-1] == {
            "op": "candidate",
            "number": number,
            "path": str(work_place / f"version-{number:06d}"),
        }
        own.hear({"op": "live", "number": number})
    (place,) = folder.iterdir()
    assert [p.name for p in kept(place)] == ["000003", "000002"]
    own.hear({"op": "live", "number": 2})  # the engine went back
    assert [p.name for p in kept(place)] == ["000002"]
    own.llm.__exit__()
    again = order(pair, work_place, learn_dir=str(folder)) | {"live": str(place / "000002")}
    own = Learner(again | {"number": 1})
    own.hear({"op": "live", "number": 0})  # back to the one that was loaded
    assert not list(kept(place))
    own.llm.__exit__()


def ruin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that make every drafter bad, in few steps."""
    monkeypatch.setattr(learning_process, "STEPS", 2)

    class Ruin:
        def __init__(self, weights: dict[str, torch.Tensor], *more: object) -> None:
            self.weights = weights

        @torch.no_grad()
        def step(self, index: int, scale: float) -> None:
            for weight in self.weights.values():
                weight.grad = None
                weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)

    monkeypatch.setattr(learning_process, "Optimiser", Ruin)


def test_the_drafter_is_the_engines_own(learner: Learner) -> None:
    assert isinstance(learner.live.drafter, Gemma4AssistantDrafter)
    assert learner.llm.pairing.drafter is None
