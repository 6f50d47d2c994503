"""Costs of passes and rounds from few measurements."""

import itertools
import random

import pytest

from outdraft.speculate.costs import DraftCosts, RowCosts, StepModel


@pytest.mark.parametrize("seed", range(5))
def test_costs_between_sizes_are_lines_whatever_the_order(seed: int) -> None:
    rng = random.Random(seed)
    known = {n: 1.0 + rng.random() * n for n in rng.sample(range(1, 60), 9)}
    costs = RowCosts()
    for n in rng.sample(sorted(known), len(known)):
        costs.set(n, 9.9)
        costs.at(rng.randint(1, 80))
        costs.set(n, known[n])
    sizes = sorted(known)
    for low, high in itertools.pairwise(sizes):
        for n in range(low, high + 1):
            share = (n - low) / (high - low)
            assert costs.at(n) == pytest.approx(known[low] + share * (known[high] - known[low]))
    assert costs.at(1) == pytest.approx(known[sizes[0]])
    assert costs.at(100) >= costs.at(sizes[-1])


def test_rounds_between_batches_and_depths() -> None:
    costs = DraftCosts()
    assert costs.at(3, 2) == 0.0
    for n in (1, 4):
        for depth in (1, 4):
            costs.set(n, depth, 0.1 * n + 0.2 * depth)
    assert costs.at(1, 2) == pytest.approx(0.5) and costs.at(2, 4) == pytest.approx(1.0)
    assert costs.at(3, 3) == pytest.approx(0.9) and costs.at(9, 1) == pytest.approx(0.6)
    assert costs.at(0, 4) == 0.0 == costs.at(4, 0)


def test_one_disturbed_step_moves_a_cost_little() -> None:
    model = StepModel()
    model.measured({n_rows: 1.0 + 0.1 * n_rows for n_rows in (1, 2, 4)})
    for _ in range(20):
        model.observe_pass(2, 1.2)
    model.observe_pass(2, 50.0)
    assert model.at(2, 2) < 1.27 and model.speed == pytest.approx(1.0)


def test_a_cost_that_was_wrong_is_corrected() -> None:
    """Measured too high at the start, beside another size that tells how fast the machine is."""
    model = StepModel()
    model.measured({1: 1.0, 2: 3.0})
    for _ in range(300):
        model.observe_pass(1, 1.0)
        model.observe_pass(2, 1.2)
    assert model.at(1, 2) / model.at(1, 1) == pytest.approx(1.2, rel=0.05)


def test_a_machine_that_changes_much_is_measured_anew() -> None:
    """Another program on its cores made every pass cost the same; then it ended."""
    model = StepModel()
    model.measured(dict.fromkeys((1, 2, 4, 8), 25.0))
    for _ in range(60):
        model.observe_pass(2, 1.2)
    for _ in range(100):
        model.observe_pass(1, 1.0)
        model.observe_pass(4, 1.4)
    assert model.at(1, 4) / model.at(1, 1) == pytest.approx(1.4, rel=0.05)


def test_fewer_rows_cost_little_more_or_were_disturbed() -> None:
    costs = RowCosts()
    for n_rows, seconds in ((1, 3.0), (2, 1.0), (4, 1.8), (8, 1.2), (15, 2.4), (16, 2.0)):
        costs.set(n_rows, seconds)
    costs.straighten()
    assert [costs.at(n) for n in (1, 2, 4, 8, 15, 16)] == [1.0, 1.0, 1.2, 1.2, 2.4, 2.0]


def test_work_around_a_round_is_added_whatever_its_size() -> None:
    """Probes of one sequence take 0.2 ms more than measured; sixteen would take as much more."""
    model = StepModel()
    model.measured({1: 1e-3, 16: 2e-3})
    model.rounds.set(1, 1, 0.1e-3)
    model.rounds.set(16, 1, 0.4e-3)
    for _ in range(60):
        model.observe_pass(16, 2e-3)
        model.observe_round(1, 1, 0.3e-3)
    assert model.draft_s(1, 1) == pytest.approx(0.3e-3, rel=0.1)
    assert model.draft_s(16, 1) == pytest.approx(0.6e-3, rel=0.1)


def test_costs_that_are_measured_again_replace_what_was_learned() -> None:
    model = StepModel()
    model.measured({1: 20e-3, 16: 40e-3})  # while the machine was busy
    model.rounds.set(1, 1, 10e-3)
    for _ in range(60):
        model.observe_pass(1, 1e-3)
        model.observe_round(1, 1, 0.1e-3)
        model.observe_rest(1, 0.1e-3)
    assert model.speed < 0.1
    model.measured({1: 1e-3, 16: 2e-3})
    assert model.speed == 1.0 and model.pass_s(1) == 1e-3 and model.rest_s(1) == 0.0


def test_a_disturbed_round_is_forgotten_while_nobody_drafts() -> None:
    model = StepModel()
    model.measured({1: 1e-3, 16: 2e-3})
    model.rounds.set(1, 1, 0.1e-3)
    model.rounds.set(4, 1, 0.2e-3)
    for _ in range(60):
        model.observe_round(1, 1, 5e-3)
    assert model.draft_s(4, 1) > 2e-3
    for _ in range(100):
        model.fade_round(4)
    assert model.draft_s(4, 1) < 0.25e-3
    assert model.draft_s(1, 1) > 2e-3


def test_what_a_further_sequence_costs_is_told_from_rows() -> None:
    """16 rows are of 16, of 8 or of 4 sequences; those of one are cheapest."""

    def pass_s(n: int, n_rows: int) -> float:
        return 1.0 + 0.05 * n_rows + 0.02 * (n - 1)

    sizes = [(1, 1), (1, 4), (4, 4), (4, 16), (8, 8), (8, 16), (16, 16), (16, 48)]
    model = StepModel()
    model.measured_batches({size: pass_s(*size) for size in sizes}, 256)
    for n, n_rows in ((1, 16), (2, 16), (12, 12), (16, 32)):
        assert model.pass_s(n_rows, n) == pytest.approx(pass_s(n, n_rows))
    model.read_back(128)
    assert model.pass_s(16, 16) == pytest.approx(pass_s(1, 16) + 15 * 0.01)
    model.measured_batches({(1, 16): 1.0, (16, 16): 9.0, (16, 32): 9.5}, 256)  # disturbed
    assert 0 < model.pass_s(16, 1) <= 1.0 and model.pass_s(32, 1) > 1.0


def test_what_is_learned_of_large_batches_changes_nothing_for_small_ones() -> None:
    model = StepModel()
    model.measured({1: 1.0, 4: 1.1, 16: 1.5, 32: 2.0})
    rng = random.Random(3)
    for _ in range(600):
        n, pass_s = rng.choice([(16, 3.0), (4, 1.1), (1, 1.0)])
        model.observe_pass(n, pass_s, n)
    assert model.pass_s(16, 16) > 2.0
    assert model.pass_s(16, 4) == pytest.approx(1.5, rel=0.1)


def test_what_follows_a_pass_with_drafts_is_known_apart() -> None:
    model = StepModel()
    model.measured({1: 1.0, 16: 2.0, 32: 3.0})
    model.observe_rest(16, 0.2)
    assert model.rest_s(16, drafted=True) == pytest.approx(0.2)  # nothing better is known
    for _ in range(40):
        model.observe_rest(16, 0.3, drafted=True)
    assert model.rest_s(16) == pytest.approx(0.2)
    assert model.rest_s(16, drafted=True) == pytest.approx(0.3, rel=0.05)
