"""Predictors, over the registry: what every one of them promises, and each by its own formula."""
import inspect
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.core.families import FAMILIES
from pack.core.run import Run, Settings
from pack.core.step import Clock
from pack.core.stepcache.hindcast import dot_products
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS, base
from pack.core.stepcache.predictors.adams_bashforth import AdamsBashforth
from pack.core.stepcache.predictors.base import weighed
from pack.core.stepcache.predictors.chebyshev import ChebyshevRidge, chebyshev
from pack.core.stepcache.predictors.divided_differences import COORDINATES, DividedDifferences
from pack.core.stepcache.predictors.dmd import DynamicModes, evenly_spaced
from pack.core.stepcache.predictors.hold import Hold
from pack.core.stepcache.predictors.taylor import Taylor
from pack.core.stepcache.predictors.zeus import Zeus
from pack.core.store import Snapshot

CANDIDATES = [candidate for predictor in PREDICTORS.values() for candidate in predictor().candidates()]
CANDIDATES += [DividedDifferences(order, coordinate) for order in (1, 2, 3) for coordinate in COORDINATES]
CANDIDATES += [Taylor(order) for order in (1, 2, 3, 4)] + [AdamsBashforth(order) for order in (2, 3, 4)]
DRAWN_TO_ZERO = ChebyshevRidge(drawn_to="zero")     # does not give a constant back whole
CANDIDATES.append(DRAWN_TO_ZERO)
EVEN = Clock([1 - n / 24 for n in range(25)], flow=True)
STEPS = [EVEN.tick(1 - n / 24) for n in range(24)]


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
    chosen = sorted(draw(st.lists(st.integers(first, min(n - 1, first + longest + 4)), min_size=longest, max_size=longest, unique=True)))
    steps = [clock.tick(sigma) for sigma in sigmas]
    return [steps[i] for i in chosen], steps[min(n, chosen[-1] + draw(st.integers(1, 4)))]


def lengths(candidate):
    return range(candidate.history, candidate.depth + 1)


def snapshots(steps, function) -> list[Snapshot]:
    """Snapshots of `function`, from places to tensors."""
    return [Snapshot(step, function(step.place)) for step in steps]


def random_path(seed: int, size: int = 24):
    """A smooth curve through a space of `size` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(6)]
    return lambda n: sum(part * math.cos(0.13 * (k + 1) * n + k) / (k + 1) for k, part in enumerate(parts)).float()


def predicted(candidate, past: list[Snapshot], at) -> torch.Tensor:
    used, weights = weighed(candidate, past, at, dot_products(past))
    return sum(weight * snapshot.value.double() for weight, snapshot in zip(weights, used, strict=True))


# every one of them ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
@given(pasts(longest=8))
@settings(max_examples=15)
def test_weights_are_one_per_snapshot_however_many_there_are(candidate, case):
    past, at = case
    assert 1 <= candidate.history <= candidate.depth <= 8
    for n in lengths(candidate):
        used, weights = weighed(candidate, snapshots(past[-n:], random_path(n)), at, dot_products(snapshots(past[-n:], random_path(n))))
        assert len(used) == len(weights) == n and all(map(math.isfinite, weights))


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if c != DRAWN_TO_ZERO], ids=str)
@given(pasts(longest=8))
@settings(max_examples=15)
def test_what_is_constant_stays(candidate, case):
    past, at = case
    for n in lengths(candidate):
        constant = [[9.0] * n for _ in range(n)]
        assert sum(candidate.weights(past[-n:], at, constant)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
@given(pasts(longest=8))
@settings(max_examples=15)
def test_reach_grows_with_the_distance(candidate, case):
    past, at = case
    for n in lengths(candidate):
        used = past[-n:]
        assert candidate.reach(used, used[-1]) == 0 < candidate.reach(used, at) < candidate.reach(used, replace(at, noise=at.noise * 0.9))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
@given(pasts(longest=8))
@settings(max_examples=10)
def test_at_the_place_of_the_newest_snapshot_all_of_them_say_the_newest(candidate, case):
    past, _ = case
    again = replace(past[-1], evaluation=past[-1].evaluation + 1)
    known = snapshots(past, random_path(1))
    assert torch.allclose(predicted(candidate, known, again), known[-1].value.double())


SPOILT = {
    "zero": lambda place: torch.zeros(5),
    "all the same": lambda place: torch.ones(5),
    "not a number": lambda place: torch.full((5,), math.nan if place > 3 else 1.0),
    "infinite": lambda place: torch.full((5,), math.inf if place > 3 else 1.0),
    "huge": lambda place: torch.full((5,), 1e30 * (1 + place)),
    "tiny": lambda place: torch.full((5,), 1e-30 * (1 + place)),
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_weights_are_finite_whatever_the_snapshots_hold(candidate, spoilt):
    past = snapshots(STEPS[1:9], SPOILT[spoilt])
    for n in lengths(candidate):
        _, weights = weighed(candidate, past[-n:], STEPS[10], dot_products(past[-n:]))
        assert len(weights) == n and all(map(math.isfinite, weights))


@pytest.mark.parametrize("meeting", [slice(0, 8), slice(0, 3), slice(6, 8)], ids=["all", "the oldest", "the newest"])
@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_weights_are_finite_where_places_meet(candidate, meeting):
    steps = STEPS[1:9]
    steps[meeting] = [steps[meeting.start]] * len(steps[meeting])
    past = snapshots(steps, random_path(3))
    for n in lengths(candidate):
        _, weights = weighed(candidate, past[-n:], STEPS[12], dot_products(past[-n:]))
        assert len(weights) == n and all(map(math.isfinite, weights))


@pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)
def test_every_predictor_is_immutable_without_state_and_has_candidates(predictor):
    entry = predictor()
    hash(entry)
    assert entry == predictor() and entry.history >= 1
    assert entry.candidates() and all(callable(c.weights) and callable(c.reach) and c.history >= 1 for c in entry.candidates())
    assert inspect.getdoc(inspect.getmodule(predictor)), "the file says what it does and where it is from"


def test_what_competes_by_default_is_hold_and_divided_differences_of_order_one_and_two():
    assert next(iter(PREDICTORS)) == "automatic"
    assert PREDICTORS["automatic"]().candidates() == (Hold(), DividedDifferences(1), DividedDifferences(2))


@pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)
def test_a_sampler_that_adds_noise_gets_no_more_than_a_line(predictor):
    settings_ = Settings(POLICIES["interval"](), predictor(), LEVELS["model output"]())
    run = lambda sampler: Run(settings_, next(iter(FAMILIES.values())), [1 - n / 24 for n in range(25)], True, sampler, 2.0, 0.0).cache
    assert run("euler").streams.candidates == predictor().candidates() and run("euler_ancestral").store.depth <= 2
    assert run("euler").store.depth == max(candidate.depth for candidate in predictor().candidates())


# polynomials ----------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("predictor", [DividedDifferences(1), Taylor(1)], ids=str)
@given(gap=st.integers(1, 5), ahead=st.integers(1, 4))
def test_order_one_on_an_even_grid_is_the_same_line(predictor, gap, ahead):
    assert predictor.weights([STEPS[2], STEPS[2 + gap]], STEPS[2 + gap + ahead]) == pytest.approx([-ahead / gap, 1 + ahead / gap])


def taylorseer(past: list[Snapshot], at, order: int) -> torch.Tensor:
    """The recursion as published, on tensors, from the first computed step on."""
    factors: list[torch.Tensor] = []
    before = None
    for step, value in ((snapshot.step, snapshot.value) for snapshot in past):
        updated = [value.double()]
        for earlier in factors[:order]:
            updated.append((updated[-1] - earlier) / (step.place - before.place))
        factors, before = updated, step
    return sum(factor * (at.place - before.place) ** i / math.factorial(i) for i, factor in enumerate(factors))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(case=pasts(longest=8), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_taylor_is_taylorseer_s_recursion_on_uneven_grids_and_from_the_second_snapshot_on(order, case, seed):
    past, at = case
    known = snapshots(past, random_path(seed))
    for n in range(2, 9):
        wanted = taylorseer(known[:n], at, order)
        assert torch.allclose(predicted(Taylor(order), known[:n], at), wanted, atol=1e-8 * float(1 + wanted.abs().max()) * 10 ** order)


def test_taylor_differs_from_divided_differences_from_order_two_on():
    uneven = [STEPS[0], STEPS[1], STEPS[4]]
    assert Taylor(2).weights(uneven, STEPS[6]) != pytest.approx(DividedDifferences(2).weights(uneven, STEPS[6]), abs=0.05)
    assert Taylor(1).weights(uneven[1:], STEPS[6]) == pytest.approx(DividedDifferences(1).weights(uneven[1:], STEPS[6]))


# Adams-Bashforth ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("order", "wanted"), [
    (2, [-1 / 2, 3 / 2]), (3, [5 / 12, -16 / 12, 23 / 12]), (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24])])
def test_adams_bashforth_has_the_textbook_s_coefficients_on_an_even_grid(order, wanted):
    assert AdamsBashforth(order).weights(STEPS[:order], STEPS[order]) == pytest.approx(wanted)


@pytest.mark.parametrize("order", [2, 3, 4])
@given(case=pasts(), coefficients=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=60)
def test_adams_bashforth_is_the_exact_mean_of_a_polynomial_below_its_order(order, case, coefficients):
    past, at = case
    used = past[-order:]
    origin, end = used[-1].place, at.place - used[-1].place
    value = lambda step: sum(c * (step.place - origin) ** k for k, c in enumerate(coefficients[:order]))
    mean = sum(c * end ** k / (k + 1) for k, c in enumerate(coefficients[:order]))
    terms = [weight * value(step) for weight, step in zip(AdamsBashforth(order).weights(used, at), used, strict=True)]
    assert sum(terms) == pytest.approx(mean, abs=1e-9 * (1 + sum(map(abs, terms))))


# ZEUS -----------------------------------------------------------------------------------------------------------------
def test_zeus_is_frozen_on_odd_skips_and_holds_on_even_ones():
    past = [STEPS[3], STEPS[6]]
    assert [Zeus().weights(past, STEPS[6 + j]) for j in (1, 2, 3, 4)] == [[-1, 2], [0, 1], [-1, 2], [0, 1]]


def test_zeus_counts_skips_by_evaluations_as_where_a_sampler_evaluates_twice_per_step():
    between = replace(STEPS[7], evaluation=STEPS[6].evaluation + 2)
    assert Zeus().weights([STEPS[5], STEPS[6]], between) == [0, 1]


# Chebyshev ridge ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("degree", [1, 4, 6])
def test_the_basis_is_the_cosines_of_multiples(degree):
    places = [0.0, 3.0, 11.5, 20.0]
    wanted = [[math.cos(k * math.acos(2 * place / 20 - 1)) for k in range(degree + 1)] for place in places]
    assert torch.allclose(chebyshev(places, 20, degree), torch.tensor(wanted, dtype=torch.float64))


@given(case=pasts(longest=8), seed=st.integers(0, 99), n=st.integers(3, 8), ridge=st.sampled_from([0.001, 0.1, 2.0]))
@settings(max_examples=40)
def test_chebyshev_is_the_direct_ridge_solution_on_tensors(case, seed, n, ridge):
    past, at = case
    known = snapshots(past[-n:], random_path(seed))
    basis, now = chebyshev([s.step.place for s in known], at.steps, 4), chebyshev([at.place], at.steps, 4)
    values = torch.stack([s.value.double() for s in known])
    line = predicted(DividedDifferences(1), known, at)

    def fitted(departures):     # ridge as least squares with five rows more
        stacked = torch.cat([basis, math.sqrt(ridge) * torch.eye(5, dtype=torch.float64)])
        return (now @ torch.linalg.lstsq(stacked, torch.cat([departures, torch.zeros(5, values.shape[1], dtype=torch.float64)])).solution)[0]

    for drawn_to, wanted in (("zero", fitted(values)), ("newest", values[-1] + fitted(values - values[-1]))):
        for blend in (1.0, 0.7):
            got = predicted(ChebyshevRidge(blend, ridge, drawn_to=drawn_to), known, at)
            assert torch.allclose(got, blend * wanted + (1 - blend) * line, atol=1e-5)


# dynamic modes --------------------------------------------------------------------------------------------------------
def exponentials(rates, seed: int, size: int = 40):
    """Sum of exponentials, random directions; a complex rate is an oscillation."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.complex(*torch.randn(2, size, generator=generator, dtype=torch.float64)) for _ in rates]
    return lambda n: sum((part * complex(rate) ** n).real for part, rate in zip(parts, rates, strict=True))


@pytest.mark.parametrize("rates", [(0.9, 0.6), (1.04, 0.8), (0.95, 1.0), (0.97 * complex(math.cos(0.4), math.sin(0.4)),)],
                         ids=["two that fade", "one that grows", "one that stays", "one that turns"])
@pytest.mark.parametrize("gap", [1, 2, 3])
@given(ahead=st.integers(1, 4), seed=st.integers(0, 99), n=st.integers(4, 6), unrelated=st.booleans())
@settings(max_examples=10)
def test_dynamic_modes_continue_a_sum_of_exponentials_within_and_beyond_the_gaps(rates, gap, ahead, seed, n, unrelated):
    path = exponentials(rates, seed)
    places = [1 + gap * k for k in range(n)]
    if unrelated and gap > 1 and n < 6:
        places.insert(-1, places[-1] - 1)       # one that is not on the even grid is not used
    past, at = snapshots([STEPS[p] for p in places], path), STEPS[min(places[-1] + ahead, 23)]
    wanted = path(at.place)
    assert (predicted(DynamicModes(), past, at) - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize(("places", "chosen", "gap"), [
    ((0, 1, 2, 3), [0, 1, 2, 3], 1), ((0, 1, 2, 5, 8, 11), [2, 3, 4, 5], 3), ((0, 2, 3, 6), [0, 2, 3], 3), ((1, 2, 4, 8), [2, 3], 4),
    ((0, 4, 6, 7, 8), [2, 3, 4], 1), ((7,), [], 1)])
def test_the_longest_evenly_spaced_choice_is_found(places, chosen, gap):
    assert evenly_spaced([float(place) for place in places]) == (chosen, pytest.approx(gap))


def test_dynamic_modes_fall_to_a_line_on_uneven_ground_and_without_dot_products():
    path = exponentials((0.9, 0.6), 1)
    for places in ((1, 2, 4, 8), (0, 1, 2)):
        past = snapshots([STEPS[p] for p in places], path)
        assert torch.allclose(predicted(DynamicModes(), past, STEPS[10]), predicted(DividedDifferences(1), past, STEPS[10]))
    even = [STEPS[p] for p in (2, 4, 6, 8)]
    line = DividedDifferences(1).weights(even[-2:], STEPS[9])
    assert DynamicModes().weights(even, STEPS[9]) == pytest.approx([0, 0, *line])
    assert DynamicModes().weights(even, STEPS[9], dot_products(snapshots(even, path))) != pytest.approx([0, 0, *line], abs=0.01)


def test_of_more_snapshots_than_it_uses_a_predictor_takes_the_newest_with_their_own_dot_products():
    past = snapshots(STEPS[:9], exponentials((0.9, 0.6), 1))
    used, weights = weighed(DynamicModes(), past, STEPS[10], dot_products(past))
    assert used == past[-6:] and weights == pytest.approx(weighed(DynamicModes(), past[-6:], STEPS[10], dot_products(past[-6:]))[1], rel=1e-6)


def test_a_mode_below_the_rank_tolerance_is_left_out():
    path, faint = exponentials((0.9,), 1), exponentials((0.5,), 2)
    past = snapshots(STEPS[:4], lambda n: path(n) + 1e-3 * faint(n))
    strict, loose = (DynamicModes(tolerance).weights(STEPS[:4], STEPS[5], dot_products(past)) for tolerance in (0.0001, 0.05))
    assert strict != pytest.approx(loose, abs=0.01), "with one mode left the weights follow its direction alone"
    for weights, within in ((strict, 1e-4), (loose, 2e-3)):
        got = sum(weight * snapshot.value for weight, snapshot in zip(weights, past, strict=True))
        assert (got - path(5) - 1e-3 * faint(5)).norm() < within * path(5).norm()


def test_dot_products_are_those_of_the_snapshots():
    past = snapshots(STEPS[:3], random_path(5))
    values = torch.stack([s.value.double() for s in past])
    assert torch.allclose(torch.tensor(dot_products(past), dtype=torch.float64), values @ values.T)


def test_the_distance_of_two_places_adds_up_and_with_little_noise_left_it_is_even():
    clock = Clock([1 - n / 100 for n in range(101)], flow=True)
    steps = [clock.tick(1 - n / 100) for n in range(100)]
    for a, b, c in ((3, 40, 90), (70, 80, 99), (0, 74, 76)):
        there = base.distance([steps[a]], steps[b]) + base.distance([steps[b]], steps[c])
        assert base.distance([steps[a]], steps[c]) == pytest.approx(there) and base.distance([steps[a]], steps[a]) == 0
    assert base.distance([steps[0]], steps[10]) == pytest.approx(1 - 0.9 ** 2)
    late = [base.distance([steps[n]], steps[n + 1]) for n in range(75, 99)]
    assert late == pytest.approx([2 * base.EVEN / 100] * len(late))
