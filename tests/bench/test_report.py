"""The figures, against ones worked out by hand, and the order of the runs."""

import json
from pathlib import Path

import pytest

from outdraft.bench.prompts import Prompt
from outdraft.bench.report import compare_peer, headline, summarise, write_bytes, write_json
from outdraft.bench.run import Arm, Measurement, Run, measure_all
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams
from outdraft.speculate.stats import DraftStats, StepTimes

# decode seconds of (plain, draft) by prompt and repeat; 11 tokens each, so 10 decoded
SECONDS = {
    ("code", 0): [(1.0, 0.5), (1.0, 0.25)],  # 2 and 4: 3
    ("code", 1): [(1.0, 1.0), (2.0, 2.0)],  # 1 and 1: 1
    ("prose", 2): [(1.0, 2.0), (1.0, 2.0)],  # 0.5
}


def result(seconds: float, *, tokens: int = 0, drafted: bool = False) -> Measurement:
    """11 tokens after a prompt of 0.5 s: one at a time, or with 4 passes of 3 drafts."""
    stats = DraftStats(n_passes=11, n_emitted=11)
    times = StepTimes(forward_s=0.8 * seconds, rest_s=0.2 * seconds)
    if drafted:
        stats = DraftStats(n_passes=5, n_emitted=11, drafted=[4, 4, 4], accepted=[3, 2, 1])
        times = StepTimes(0.3 * seconds, 0.6 * seconds, 0.1 * seconds)
    return Measurement([tokens] * 11, 0.5, seconds, stats, times)


def runs() -> list[Run]:
    made = []
    for (kind, prompt), repeats in SECONDS.items():
        for repeat, (plain, draft) in enumerate(repeats):
            made.append(Run("plain", kind, prompt, repeat, result(plain)))
            made.append(Run("draft", kind, prompt, repeat, result(draft, drafted=True)))
    return made


def test_rates_and_ratios() -> None:
    found = summarise(runs())
    code = found["kinds"]["code"]
    assert code["n_prompts"] == 2
    assert code["plain_tok_s"] == pytest.approx(40 / 5)
    assert code["draft_tok_s"] == pytest.approx(40 / 3.75)
    assert code["plain_tok_s_with_prompt"] == pytest.approx(44 / 7)
    assert code["speedup"] == pytest.approx(2)  # of 3 and 1
    assert code["speedup_spread"] == pytest.approx({"q1": 1.5, "q3": 2.5, "min": 1, "max": 4})
    assert found["kinds"]["prose"]["speedup"] == pytest.approx(0.5)
    assert found["kinds"]["prose"]["speedup_spread"]["q1"] == pytest.approx(0.5)
    assert found["overall"]["speedup"] == pytest.approx(1)  # of 3, 1 and 0.5
    assert list(found["kinds"]) == ["code", "prose"]


def test_acceptance_and_costs() -> None:
    prose = summarise(runs())["kinds"]["prose"]
    assert prose["tokens_per_pass"] == pytest.approx(11 / 5)
    assert prose["acceptance"] == pytest.approx([3 / 4, 2 / 4, 1 / 4])
    assert prose["acceptance_conditional"] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert prose["time_share"] == pytest.approx({"draft": 0.3, "verify": 0.6, "rest": 0.1})
    plain_pass_s = 0.8 / 10
    assert prose["draft_step_cost"] == pytest.approx(0.3 * 2 / 12 / plain_pass_s)
    assert prose["verify_cost"] == pytest.approx(0.6 * 2 / 4 / plain_pass_s)


def test_one_different_token_is_not_identical() -> None:
    made = runs()
    assert summarise(made)["identical"] is True
    made[3] = Run("draft", "code", 0, 1, result(0.25, tokens=7, drafted=True))
    assert summarise(made)["identical"] is False


def test_the_headline_says_what_it_is_of() -> None:
    top = headline(summarise(runs()))
    assert top["speedup"] == pytest.approx(2) and top["tokens_per_pass"] == pytest.approx(2.2)
    assert "greedy" in top["of"] and "code" in top["of"]
    only_prose = headline(summarise([run for run in runs() if run.kind == "prose"]))
    assert only_prose["speedup"] == pytest.approx(0.5) and "prose" in only_prose["of"]


def test_a_peer_beside_us() -> None:
    made = runs()
    for (kind, prompt), repeats in SECONDS.items():
        for repeat in range(len(repeats)):
            made.append(Run("its plain", kind, prompt, repeat, result(2.0)))
            odd = int(kind == "code" and repeat == 1)
            made.append(Run("its assisted", kind, prompt, repeat, result(4.0, tokens=odd)))
            made.append(Run("its other", kind, prompt, repeat, result(1.6)))
    found = compare_peer(made, "its plain", ["its other", "its assisted"])
    assert found["assisted"] == found["best"] == "its other"
    assert found["arms"]["its assisted"]["equals_its_plain"] == "4 of 6"
    assert found["arms"]["its other"]["equals_its_plain"] == "6 of 6"
    assert found["arms"]["its other"]["speedup"] == pytest.approx(2 / 1.6)
    assert found["overall"]["ours_drafting_over_its_best"] == pytest.approx(1.2)  # of 4.8, 1.6, 0.8
    found = compare_peer(made, "its plain", ["its assisted"])
    assert found["best"] == "its plain"  # drafting does not pay there
    assert found["overall"]["ours_drafting_over_its_best"] == pytest.approx(1.5)
    code = found["kinds"]["code"]
    assert code["plain_tok_s"] == pytest.approx(5) and code["assisted_tok_s"] == pytest.approx(2.5)
    assert code["assisted_speedup"] == pytest.approx(0.5)
    assert code["assisted_equals_its_plain"] == "2 of 4"
    assert code["its_plain_equals_ours"] == "4 of 4"
    assert code["ours_over_its_plain"] == pytest.approx((2 + 1.5) / 2)
    assert found["overall"]["ours_drafting_over_its_assisted"] == pytest.approx(3)


def test_arms_take_turns_and_share_seeds() -> None:
    calls: list[tuple[str, int, int | None]] = []

    def arm(name: str) -> Arm:
        def measure(tokens: object, params: SamplingParams) -> Measurement:
            calls.append((name, tokens[0], params.seed))  # type: ignore[index]
            return result(1.0)

        return Arm(name, measure)

    prompts = [Prompt("code", "a", 1, "", (10,)), Prompt("prose", "a", 2, "", (11,))]
    made = list(measure_all([arm("A"), arm("B")], prompts, SamplingParams(seed=5), repeats=2))
    assert [name for name, _, _ in calls] == list("ABBABAAB")
    assert [(token, seed) for _, token, seed in calls[::2]] == [(10, 5), (10, 6), (11, 7), (11, 8)]
    assert [seed for _, _, seed in calls[::2]] == [seed for _, _, seed in calls[1::2]]
    assert [(run.kind, run.prompt, run.repeat) for run in made[::2]] == [
        ("code", 0, 0),
        ("code", 0, 1),
        ("prose", 1, 0),
        ("prose", 1, 1),
    ]


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutdraftError, match="No space left"):
        write_json(path, {"a": "b"})
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
    assert "ä" in path.read_text(encoding="utf-8")
    with pytest.raises(OutdraftError, match="cannot be written"):
        write_bytes(path / "below", b"")
