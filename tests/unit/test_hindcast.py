"""Hindcast: every candidate is scored on what it would have said, and the best is chosen."""
import math

import pytest
import torch

from pack.core.step import Clock
from pack.core.stepcache.hindcast import FEW, Hindcast, dot_products, relative_error, sampled
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.stepcache.predictors.divided_differences import DividedDifferences
from pack.core.stepcache.predictors.dmd import DynamicModes
from pack.core.stepcache.predictors.hold import Hold
from pack.core.stepcache.predictors.taylor import Taylor
from pack.core.store import Snapshot
from pack.kernels.drift import SAMPLE

CLOCK = Clock([1 - n / 20 for n in range(21)], flow=True)
STEPS = [CLOCK.tick(1 - n / 20) for n in range(20)]
HOLD, LINE, PARABOLA = Hold(), DividedDifferences(1), DividedDifferences(2)


def path(degree: int, steps=range(20)) -> list[Snapshot]:
    """Snapshots of a random polynomial of the step index."""
    generator = torch.Generator().manual_seed(degree)
    coefficients = [torch.randn(3, 8, generator=generator) for _ in range(degree + 1)]
    return [Snapshot(STEPS[n], sum(c * (n / 5) ** k for k, c in enumerate(coefficients))) for n in steps]


def scored(degree: int, candidates=(HOLD, LINE, PARABOLA), until: int = 5) -> Hindcast:
    hindcast, known = Hindcast(candidates), path(degree)
    for n in range(1, until):
        hindcast.score(known[max(0, n - 3): n], known[n].step, known[n].value)
        hindcast.settle(candidates[0])
    return hindcast


@pytest.mark.parametrize(("degree", "best"), [(1, LINE), (2, PARABOLA)])
def test_the_candidate_that_fits_the_path_is_chosen(degree, best):
    chosen, expected = scored(degree).choose(tuple(STEPS[:5]), STEPS[5])
    assert chosen == best and expected < 1e-4


def fading(steps=range(20)) -> list[Snapshot]:
    """A sum of two exponentials, which no polynomial continues."""
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    return [Snapshot(STEPS[n], a * 0.8 ** n + b * 0.5 ** n) for n in steps]


def test_a_predictor_that_depends_on_the_snapshots_competes_with_their_dot_products():
    modes, known = DynamicModes(), fading()
    hindcast = Hindcast((HOLD, LINE, modes))
    for n in range(4, 8):
        hindcast.score(known[n - 4: n], known[n].step, known[n].value, dot_products(known[n - 4: n]))
        hindcast.settle(modes)
    assert hindcast.needs_gram and not Hindcast((HOLD, LINE)).needs_gram
    chosen, expected = hindcast.choose(tuple(STEPS[:8]), STEPS[8])
    assert chosen == modes and expected < 1e-3


@pytest.mark.parametrize("candidate", [c for entry in PREDICTORS.values() for c in entry().candidates()], ids=str)
def test_every_candidate_is_scored_on_all_the_snapshots_that_it_uses(candidate):
    known = fading()
    past = known[:candidate.depth]
    hindcast, at = Hindcast((candidate,)), known[candidate.depth]
    hindcast.score(past, at.step, at.value, dot_products(past))
    hindcast.settle(candidate)
    weights = candidate.weights([s.step for s in past], at.step, dot_products(past))
    guess = sum(weight * s.value for weight, s in zip(weights, past, strict=True))
    assert hindcast.last == pytest.approx(relative_error(guess, at.value).item(), rel=1e-3, abs=1e-6)


def test_how_far_a_candidate_reaches_counts_with_all_the_snapshots_that_it_uses():
    hindcast, known = Hindcast((Taylor(3),)), path(3)
    hindcast.score(known[:4], known[4].step, known[4].value + 1)
    hindcast.settle(None)
    one, two = (hindcast.choose(tuple(STEPS[:4]), STEPS[3 + ahead])[1] for ahead in (1, 2))
    assert two == pytest.approx(16 * one), "order 3 has an error of order 4"


def test_a_candidate_is_scored_on_what_a_skip_would_have_put_there_if_that_is_told():
    hindcast, known = Hindcast((HOLD, LINE)), path(1)
    hindcast.score(known[:2], known[2].step, known[2].value, said={HOLD: known[2].value * 1.25})
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.25)
    assert hindcast.choose(tuple(STEPS[:3]), STEPS[3])[0] == LINE, "the others by their own word"


def test_on_noise_hold_is_chosen():
    hindcast, generator = Hindcast((HOLD, LINE, PARABOLA)), torch.Generator().manual_seed(0)
    known = [Snapshot(step, torch.randn(400, generator=generator)) for step in STEPS]
    for n in range(3, 8):
        hindcast.score(known[n - 3: n], known[n].step, known[n].value)
        hindcast.settle(HOLD)
    assert hindcast.choose(tuple(STEPS[:8]), STEPS[8])[0] == HOLD


def test_the_error_is_the_relative_mean_difference_and_is_told_for_the_best():
    hindcast = Hindcast((HOLD,))
    hindcast.score([Snapshot(STEPS[0], torch.tensor([1.0, 3.0]))], STEPS[1], torch.tensor([2.0, 2.0]))
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.5)


def test_the_expected_error_grows_as_the_reach_of_the_candidate():
    hindcast = Hindcast((LINE,))
    hindcast.score([Snapshot(STEPS[n], torch.tensor([v])) for n, v in ((0, 1.0), (1, 2.0))], STEPS[2], torch.tensor([4.0]))
    hindcast.settle(LINE)
    assert hindcast.last == pytest.approx(0.25)
    expected = [hindcast.choose((STEPS[1], STEPS[2]), STEPS[2 + ahead])[1] for ahead in (1, 2, 3)]
    assert expected == pytest.approx([0.25, 1.0, 2.25])


def test_rates_are_halved_into_the_new_one():
    hindcast = Hindcast((HOLD,))
    for n, (before, now) in enumerate(((1.0, 2.0), (2.0, 2.0)), 1):
        hindcast.score([Snapshot(STEPS[n - 1], torch.tensor([before]))], STEPS[n], torch.tensor([now]))
        hindcast.settle(HOLD)
    assert hindcast.choose((STEPS[2],), STEPS[3]) == (HOLD, pytest.approx(0.25))


def test_of_several_rows_the_worst_counts():
    hindcast = Hindcast((HOLD,))
    for value in (1.0, 1.5, 1.1):
        hindcast.score([Snapshot(STEPS[0], torch.tensor([value]))], STEPS[1], torch.tensor([1.0]))
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.5)


def test_a_second_evaluation_at_the_same_place_is_scored_by_itself():
    hindcast = Hindcast((HOLD,))
    assert hindcast.choose((STEPS[1],), STEPS[1]) == (HOLD, None), "unknown, so nothing is skipped there"
    hindcast.score([Snapshot(STEPS[1], torch.full((3,), 1.25))], STEPS[1], torch.ones(3))
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.25)
    assert hindcast.choose((STEPS[1],), STEPS[1]) == (HOLD, pytest.approx(0.25))
    assert hindcast.choose((STEPS[1],), STEPS[2]) == (HOLD, None), "it tells nothing about how errors grow with distance"


def test_an_error_without_end_is_forgotten_at_the_next_one_that_has():
    hindcast = Hindcast((HOLD,))
    for n, value in enumerate((math.inf, 1.5)):
        hindcast.score([Snapshot(STEPS[n], torch.tensor([value]))], STEPS[n + 1], torch.ones(1))
        hindcast.settle(HOLD)
    assert hindcast.choose((STEPS[2],), STEPS[3])[1] == pytest.approx(0.5)


def test_a_prediction_that_is_not_a_number_is_infinitely_wrong():
    hindcast = Hindcast((HOLD,))
    hindcast.score([Snapshot(STEPS[0], torch.tensor([math.nan]))], STEPS[1], torch.ones(1))
    hindcast.settle(HOLD)
    assert hindcast.choose((STEPS[1],), STEPS[2])[1] == math.inf


def test_without_history_enough_there_is_no_choice_and_without_scores_no_expectation():
    hindcast = Hindcast((LINE, PARABOLA))
    assert hindcast.choose((STEPS[0],), STEPS[1]) == (None, None)
    assert hindcast.choose((STEPS[0], STEPS[1]), STEPS[2]) == (LINE, None)


def test_a_sample_is_small_and_walks_through_every_channel():
    value = torch.zeros(2, 4096, 256)
    value[..., 7] = 1
    part = sampled(value)
    assert SAMPLE / 2 < part.numel() <= 2 * SAMPLE and part.mean() == pytest.approx(1 / 256, rel=0.1)
    assert torch.equal(sampled(value[0, :3]), value[0, :3].reshape(-1))
    assert FEW / 2 < sampled(value, FEW).numel() <= 2 * FEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_relative_error_is_fp32_whatever_goes_in(dtype):
    error = relative_error(torch.full((70000,), 1.5, dtype=dtype), torch.ones(70000, dtype=dtype))
    assert error.dtype == torch.float32 and error.ndim == 0 and error.item() == pytest.approx(0.5)
    assert torch.isfinite(relative_error(torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)))
