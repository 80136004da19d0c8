"""Predictors, over the registry: what every one of them promises, and polynomials for those that are."""
import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.core.step import Clock
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.stepcache.predictors.divided_differences import COORDINATES, DividedDifferences

CANDIDATES = [candidate for predictor in PREDICTORS.values() for candidate in predictor().candidates()]
CANDIDATES += [DividedDifferences(order, coordinate) for order in (1, 2, 3) for coordinate in COORDINATES]


@st.composite
def pasts(draw, longest=4):
    """Steps of an uneven grid: computed ones, newest last, and one that follows them."""
    n = draw(st.integers(longest + 2, 30))
    ratios = draw(st.lists(st.floats(0.75, 0.97), min_size=n, max_size=n))
    sigmas = [0.99]
    for ratio in ratios:
        sigmas.append(sigmas[-1] * ratio)
    clock = Clock([*sigmas, 0.0], flow=True)
    first = draw(st.integers(0, n - longest - 1))
    chosen = sorted(draw(st.lists(st.integers(first, min(n - 1, first + 8)), min_size=longest, max_size=longest, unique=True)))
    steps = [clock.tick(sigma) for sigma in sigmas]
    return [steps[i] for i in chosen], steps[min(n, chosen[-1] + draw(st.integers(1, 4)))]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
@given(pasts())
@settings(max_examples=30)
def test_weights_are_one_per_snapshot_and_sum_to_one(candidate, case):
    past, at = case
    weights = candidate.weights(past[-candidate.history:], at)
    assert len(weights) == candidate.history and sum(weights) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
@given(pasts())
@settings(max_examples=30)
def test_what_is_constant_stays_and_reach_grows_with_the_distance(candidate, case):
    past, at = case
    used = past[-candidate.history:]
    assert sum(weight * 3.0 for weight in candidate.weights(used, at)) == pytest.approx(3)
    assert candidate.reach(used, used[-1]) == 0 < candidate.reach(used, at)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("order", [1, 2, 3])
@given(case=pasts(), coefficients=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=60)
def test_divided_differences_continue_a_polynomial_of_their_order_exactly(order, coordinate, case, coefficients):
    past, at = case
    used = past[-order - 1:]
    position = COORDINATES[coordinate]
    polynomial = lambda step: sum(c * (position(step) - position(used[-1])) ** k for k, c in enumerate(coefficients[:order + 1]))
    weights = DividedDifferences(order, coordinate).weights(used, at)
    got = sum(weight * polynomial(step) for weight, step in zip(weights, used, strict=True))
    scale = sum(abs(weight * polynomial(step)) for weight, step in zip(weights, used, strict=True)) + 1
    assert got == pytest.approx(polynomial(at), abs=1e-9 * scale)


@given(pasts())
def test_divided_differences_at_a_computed_step_are_its_snapshot(case):
    past, _ = case
    assert DividedDifferences(3).weights(past, past[-1]) == pytest.approx([0, 0, 0, 1])


@given(st.integers(1, 5), st.integers(1, 4))
def test_order_one_on_an_even_grid_is_taylorseers_first_order(gap, ahead):
    clock = Clock([1 - n / 20 for n in range(21)], flow=True)
    steps = [clock.tick(1 - n / 20) for n in range(20)]
    weights = DividedDifferences(1).weights([steps[2], steps[2 + gap]], steps[2 + gap + ahead])
    assert weights == pytest.approx([-ahead / gap, 1 + ahead / gap])


@pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)
def test_every_predictor_is_immutable_without_state_and_has_candidates(predictor):
    entry = predictor()
    hash(entry)
    assert entry == predictor() and entry.history >= 1
    assert entry.candidates() and all(callable(c.weights) and callable(c.reach) and c.history >= 1 for c in entry.candidates())
    assert inspect.getdoc(inspect.getmodule(predictor)), "the file says what it does and where it is from"
