"""Plain decoding against drafting, by trying: the better one is used, and trying costs little."""

import random

import pytest

from outdraft.speculate.trial import Trial, Trials


def run(
    drafting: float, n_steps: int, seed: int, *, batch: int = 16, noise: float = 0.1
) -> tuple[Trial, float, int]:
    """Steps of a batch where drafting is so many times plain decoding.

    Returns:
        The trial, its tokens per second over those of the better way, and steps until it was used
        for good.
    """
    rng, trial = random.Random(seed), Trial()
    tokens = seconds = 0.0
    last_worse = 0
    better = max(1.0, drafting)
    for step in range(n_steps):
        plain = trial.decodes_plainly
        if plain:
            own, cost = batch, 1.0
        else:  # two drafts a sequence, of which each stays with 0.7
            own = batch + sum(rng.random() < p for p in (0.7, 0.49) for _ in range(batch))
            cost = (1 + 0.7 + 0.49) / drafting
        cost *= 1 + noise * rng.random()
        trial.observe(own, cost, alike=False)
        tokens, seconds = tokens + own, seconds + cost
        if trial.plain == (drafting > 1):
            last_worse = step
    return trial, tokens / seconds * (1 + noise / 2) / (batch * better), last_worse


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drafting", [0.6, 0.85, 0.93])
def test_drafts_that_do_not_pay_are_left(drafting: float, seed: int) -> None:
    trial, share, last_worse = run(drafting, 1500, seed)
    assert trial.plain
    assert share > 0.97
    assert last_worse < 1000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("drafting", [1.5, 2.5])
def test_drafts_that_pay_are_kept(drafting: float, batch: int, seed: int) -> None:
    trial, share, _ = run(drafting, 3000, seed, batch=batch)
    assert not trial.plain
    assert share > 0.95


def test_what_is_alike_is_not_tried() -> None:
    trial = Trial()
    for _ in range(500):
        assert not trial.decodes_plainly
        trial.observe(1, 1.0, alike=True)


def test_a_change_of_the_machine_is_found() -> None:
    trial = Trial()
    for step in range(6000):
        faster = 0.8 if step < 2000 else 1.6
        plain = trial.decodes_plainly
        trial.observe(16 if plain else 32, 1.0 if plain else 2 / faster, alike=False)
        if step == 1999:
            assert trial.plain
    assert not trial.plain


def test_bands_are_apart() -> None:
    trials = Trials()
    names = [id(trials.of(n)) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17)]
    assert len(set(names)) == 6 and names[2] == names[3] and names[4] == names[5]


def test_trials_wait_where_drafting_promises_much() -> None:
    def first_trial(promise: float) -> int:
        trial = Trial()
        for step in range(500):
            if trial.trying:
                return step
            trial.observe(2, 1.0, alike=False, promise=promise)
        return 500

    assert first_trial(1.1) < 10 and 40 < first_trial(1.8) < 500


def test_what_was_promised_weighs_against_a_few_lucky_trials() -> None:
    def plain_after(gains: list[float]) -> bool:
        trial = Trial()
        for gain in gains:
            while not trial.trying:
                trial.observe(10, 1.0, alike=False, promise=1.2)
            while trial.trying:
                trial.observe(10, 1.0 / gain, alike=False, promise=1.2)
        return trial.plain

    assert not plain_after([1.1, 0.9, 1.1])  # noise
    assert plain_after([1.1, 1.1, 1.1, 1.1, 1.1])
