"""The length controller on synthetic costs and acceptances."""

import random

import pytest

from outdraft.speculate.length import LengthController

TARGET_S = [1.0, 1.05, 1.1, 1.15, 1.2, 1.9, 2.1]


def run(
    controller: LengthController, rate: float, n_steps: int, seed: int = 3
) -> tuple[int, float, list[int]]:
    """Tokens, seconds and the lengths chosen for one sequence."""
    rng, tokens, seconds, chosen = random.Random(seed), 0, 0.0, []
    for _ in range(n_steps):
        (k,) = lengths(controller, ["a"])
        kept = 0
        while kept < k and rng.random() < rate:
            kept += 1
        controller.observe_step(1, 1 + k, int(k > 0), k, TARGET_S[k], 0.1 * k)
        controller.observe_block("a", "model", k, kept)
        tokens, seconds = tokens + kept + 1, seconds + TARGET_S[k] + 0.1 * k
        chosen.append(k)
    return tokens, seconds, chosen


def lengths(controller: LengthController, names: list[str]) -> list[int]:
    return [c.n_drafts for c in controller.choose([(name, ("model",)) for name in names])]


def started() -> LengthController:
    controller = LengthController(6)
    controller.costs.measured({1 + k: target_s for k, target_s in enumerate(TARGET_S)})
    for k in range(1, 7):
        controller.costs.rounds.set(1, k, 0.1 * k)
    return controller


def fixed_rate(rate: float, k: int) -> float:
    return sum(rate**j for j in range(k + 1)) / (TARGET_S[k] + 0.1 * k)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.6, 0.9])
def test_within_three_percent_of_the_best_fixed_length(rate: float) -> None:
    chosen = run(started(), rate, 4000)[2]
    mean_rate = sum(sum(rate**j for j in range(k + 1)) for k in chosen) / sum(
        TARGET_S[k] + 0.1 * k for k in chosen
    )
    assert mean_rate >= 0.97 * max(fixed_rate(rate, k) for k in range(7))


def test_the_first_choice_believes_what_drafts_usually_come_to() -> None:
    """No step is spent on finding out that a drafter is there."""
    assert lengths(started(), ["a"])[0] >= 2


def test_a_useless_drafter_is_switched_off_and_tried_rarely() -> None:
    chosen = run(started(), 0.0, 2000)[2]
    assert sum(k > 0 for k in chosen[40:]) <= 0.1 * len(chosen)
    assert sum(TARGET_S[k] + 0.1 * k - 1.0 for k in chosen[40:]) <= 0.02 * len(chosen)


def test_drafting_returns_when_acceptance_does() -> None:
    controller = started()
    run(controller, 0.0, 500)
    assert sum(k > 0 for k in run(controller, 0.95, 1500)[2][-200:]) > 190


def test_what_lies_behind_the_first_rejection_changes_nothing() -> None:
    short, long = started(), started()
    short.observe_block("a", "model", 2, 1)
    long.observe_block("a", "model", 6, 1)
    assert lengths(short, ["a"]) == lengths(long, ["a"])
    assert short._own == long._own and short._shared == long._shared


def test_sources_are_counted_apart() -> None:
    """Matches in the text that are never kept leave the model's guesses alone, and are left out."""
    controller = started()
    for _ in range(60):
        controller.observe_block("a", "ngram 4", 6, 0)
        controller.observe_block("a", "model", 4, 4)
    (choice,) = controller.choose([("a", ("ngram 4", "model"))])
    assert choice.source == "model" and choice.n_drafts >= 4
    (choice,) = controller.choose([("a", ("ngram 16", "model"))])
    assert choice.source == "model"
    for _ in range(60):
        controller.observe_block("b", "ngram 16", 6, 6)
    (choice,) = controller.choose([("c", ("ngram 16", "model"))])
    assert choice.source == "ngram 16"  # as good, and without a draft round
    (choice,) = controller.choose([("a", ())])
    assert choice.n_drafts == 0


def test_a_source_that_was_given_up_is_tried_again() -> None:
    controller = started()
    for _ in range(200):
        controller.observe_block("a", "ngram 4", 6, 0)
        controller.observe_block("a", "model", 4, 1)
    chosen = [controller.choose([("a", ("ngram 4", "model"))])[0].source for _ in range(1000)]
    assert chosen[0] == "model" and "ngram 4" in chosen


def test_each_sequence_of_a_batch_has_its_own_length() -> None:
    controller = LengthController(4)
    controller.costs.measured({n_rows: 1.0 + 0.15 * n_rows for n_rows in range(1, 21)})
    for _ in range(100):
        controller.observe_block("good", "model", 4, 4)
        controller.observe_block("bad", "model", 4, 0)
    names = ["bad", "good", "bad", "good"]
    long = lengths(controller, names)
    assert long[0] == long[2] == 0 and long[1] == long[3] == 4
    assert lengths(controller, ["good"] * 4) == [4] * 4


@pytest.mark.parametrize("factor", [0.6, 1.8])
def test_a_machine_of_another_speed_changes_no_choice(factor: float) -> None:
    controller = started()
    run(controller, 0.6, 200)
    before = lengths(controller, ["a"])
    for _ in range(200):
        (k,) = before
        controller.observe_step(1, 1 + k, 1, k, factor * TARGET_S[k], factor * 0.1 * k)
    assert lengths(controller, ["a"]) == before
    assert controller.costs.speed == pytest.approx(factor)


def test_no_passes_measured_no_drafts() -> None:
    assert lengths(LengthController(4), ["a", "b"]) == [0, 0]


def test_a_cold_controller_learns_that_drafting_does_not_pay() -> None:
    chosen = run(LengthController(6), 0.0, 1000)[2]
    assert sum(TARGET_S[k] + 0.1 * k - 1.0 for k in chosen) <= 0.03 * len(chosen)


@pytest.mark.parametrize("rate", [0.6, 0.9])
def test_a_cold_controller_finds_the_best_length(rate: float) -> None:
    """Its lengths behind the first few hundred steps, and what finding them cost."""
    chosen = run(LengthController(6), rate, 4000)[2]
    best = max(fixed_rate(rate, k) for k in range(7))
    for part, share in ((chosen, 0.95), (chosen[400:], 0.97)):
        tokens = sum(sum(rate**j for j in range(k + 1)) for k in part)
        assert tokens / sum(TARGET_S[k] + 0.1 * k for k in part) >= share * best
