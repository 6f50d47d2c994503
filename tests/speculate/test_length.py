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
        (k,) = controller.choose(["a"])
        kept = 0
        while kept < k and rng.random() < rate:
            kept += 1
        controller.observe_step(1, 1 + k, k, TARGET_S[k], 0.1 * k)
        controller.observe_block("a", k, kept)
        tokens, seconds = tokens + kept + 1, seconds + TARGET_S[k] + 0.1 * k
        chosen.append(k)
    return tokens, seconds, chosen


def started() -> LengthController:
    controller = LengthController(6)
    for k, target_s in enumerate(TARGET_S):
        controller.observe_step(1, 1 + k, k, target_s, 0.1 * k)
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


def test_a_useless_drafter_is_switched_off_and_tried_rarely() -> None:
    chosen = run(started(), 0.0, 2000)[2]
    assert sum(k > 0 for k in chosen[40:]) <= 0.1 * len(chosen)
    assert sum(TARGET_S[k] + 0.1 * k - 1.0 for k in chosen[40:]) <= 0.02 * len(chosen)


def test_drafting_returns_when_acceptance_does() -> None:
    controller = started()
    run(controller, 0.0, 500)
    assert sum(k > 0 for k in run(controller, 0.95, 1500)[2][-200:]) > 190


def test_an_unmeasured_batch_runs_plain_once() -> None:
    controller = started()
    assert controller.choose(["a", "b"]) == [0, 0]
    controller.observe_step(2, 2, 0, 1.0, 0.0)
    assert any(controller.choose(["a", "b"]))


def test_what_lies_behind_the_first_rejection_changes_nothing() -> None:
    short, long = started(), started()
    short.observe_block("a", 2, 1)
    long.observe_block("a", 6, 1)
    assert short.choose(["a"]) == long.choose(["a"])
    assert short._own["a"] == long._own["a"]


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
