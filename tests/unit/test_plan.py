"""Plans: dynamic programming against every schedule there is, on problems small enough for that."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.core.stepcache.profiles.plan import LEFT, allowed, error_of, group_costs, neighbours, plans


def parabola(nodes, values, at):
    """The polynomial through all nodes, by solving for its coefficients."""
    coefficients = np.linalg.solve(np.vander(np.array(nodes, float), len(nodes)), values)
    return np.vander([float(at)], len(nodes)) @ coefficients


def group(d, gaps, past, following):
    """u and v of one group by the definition, as vectors: what was missed, and what looking back leaves of it."""
    now, skips = past[-1], range(past[-1] + 1, following)

    def off(nodes):
        return sum((gaps[m] * (parabola(nodes, d[nodes], m)[0] - d[m]) for m in skips), np.zeros(d.shape[1]))

    nodes = [past[-count:] for count in range(min(len(past), 2), min(len(past), 3) + 1)]
    missed = min((off(list(n)) for n in nodes), key=np.linalg.norm)
    return missed, off([*past[-2:], following]), now


def error(d, gaps, gains, computed, looks_back):
    """The root of the sum of E over the groups."""
    parts = (group(d, gaps, list(computed[:n + 1]), computed[n + 1]) for n in range(len(computed) - 1))
    return math.sqrt(sum(gains[now] ** 2 * ((v @ v + LEFT ** 2 * u @ u) if looks_back else u @ u) for u, v, now in parts))


def every_schedule(total, longest, may_skip):
    for count in range(total - 1):
        for inner in itertools.combinations(range(1, total - 1), count):
            computed = (0, *inner, total - 1)
            if all(b - a - 1 <= longest for a, b in itertools.pairwise(computed)) and all(n in computed or may_skip[n] for n in range(total)):
                yield computed


@st.composite
def problems(draw):
    total = draw(st.integers(3, 8))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    d = np.cumsum(rng.normal(size=(total, 6)), 0)
    return d, rng.uniform(0.01, 0.2, total), rng.uniform(0.3, 3.0, total), draw(st.integers(1, 5)), draw(
        st.lists(st.sampled_from([True, True, True, False]), min_size=total, max_size=total)), draw(st.booleans())


def planned(problem):
    d, gaps, gains, longest, may_skip, looks_back = problem
    return plans(torch.from_numpy(d @ d.T), gaps.tolist(), gains.tolist(), longest, may_skip, looks_back)


@settings(max_examples=100)
@given(problems())
def test_of_all_schedules_with_a_count_the_one_with_the_least_error_is_found(problem):
    d, gaps, gains, longest, may_skip, looks_back = problem
    found, least = planned(problem), {}
    for computed in every_schedule(len(gaps), longest, may_skip):
        least[len(computed)] = min(least.get(len(computed), math.inf), error(d, gaps, gains, computed, looks_back))
    assert found.keys() == least.keys()
    for count, plan in found.items():
        assert plan.error == pytest.approx(least[count], rel=1e-6, abs=1e-7)
        assert plan.error == pytest.approx(error(d, gaps, gains, plan.computed, looks_back), rel=1e-6, abs=1e-7)


@settings(max_examples=60)
@given(problems())
def test_a_plan_has_exactly_its_count_and_obeys_every_limit(problem):
    d, gaps, gains, longest, may_skip, looks_back = problem
    found, allowed = planned(problem), set(every_schedule(len(gaps), longest, may_skip))
    assert len(gaps) in found, "everything may be computed"
    for count, plan in found.items():
        assert len(plan.computed) == count and plan.computed in allowed


def test_what_moves_along_a_line_is_skipped_for_free_and_a_jump_is_computed():
    total = 12
    d = np.outer(np.arange(total), np.array([1.0, -2.0, 0.5]))
    d[7:] += 40.0
    found = planned((d, np.full(total, 0.1), np.ones(total), 4, [True] * total, True))
    free = min((plan for plan in found.values() if plan.error < 1e-6), key=lambda plan: len(plan.computed))
    assert len(free.computed) < 8 and {6, 7} <= set(free.computed)
    assert found[min(found)].error > 1e-2


def test_sixty_steps_are_planned_and_a_further_computed_step_helps():
    d = np.cumsum(np.cumsum(np.random.default_rng(0).normal(size=(60, 80)), 0), 0)
    found = planned((d, np.full(60, 1 / 60), np.ones(60), 5, [True] * 60, True))
    assert sorted(found) == list(range(11, 61))
    errors = [found[count].error for count in sorted(found)]
    assert errors[-1] == 0.0 and errors[0] > 2 * errors[10] > 4 * errors[25]


@settings(max_examples=60)
@given(problems())
def test_the_error_of_any_schedule_can_be_told(problem):
    d, gaps, gains, longest, may_skip, looks_back = problem
    costs = group_costs(torch.from_numpy(d @ d.T), gaps.tolist(), gains.tolist(), longest + 1, looks_back)
    for computed in every_schedule(len(gaps), longest, may_skip):
        assert error_of(costs, computed) == pytest.approx(error(d, gaps, gains, computed, looks_back), rel=1e-6, abs=1e-7)


@given(problems())
def test_neighbours_differ_in_one_place_by_one_step_and_obey_the_limits(problem):
    *_, longest, may_skip, _ = problem
    everything = set(every_schedule(len(may_skip), longest, may_skip))
    for computed in everything:
        assert allowed(computed, longest, may_skip)
        wanted = {other for other in everything if len(other) == len(computed) and sum(abs(a - b) for a, b in zip(computed, other, strict=True)) == 1}
        assert set(neighbours(computed, longest, may_skip)) == wanted
