"""The clock: where a run is, told from the sigmas alone."""
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pack.core.step import CLOSE, Clock


@st.composite
def schedules(draw):
    """Falling sigmas, as few as two, steep or flat, ending in 0 or above."""
    ratios = draw(st.lists(st.floats(0.3, 0.99), min_size=1, max_size=40))
    sigmas = [draw(st.floats(0.5, 100.0))]
    for ratio in ratios:
        sigmas.append(sigmas[-1] * ratio)
    assume(sigmas[-1] > 1e-5)
    return [*sigmas, 0.0] if draw(st.booleans()) else sigmas


@given(schedules(), st.booleans())
def test_the_sigmas_of_a_schedule_are_at_their_indices(sigmas, flow):
    clock = Clock(sigmas, flow)
    for n, sigma in enumerate(sigmas[:-1]):
        step = clock.tick(sigma)
        assert step.place == n == step.index == step.evaluation
        assert step.steps == len(sigmas) - 1 and step.last == (n == len(sigmas) - 2) and not step.rises


@given(schedules(), st.data())
def test_a_sigma_between_two_of_the_schedule_is_between_their_places(sigmas, data):
    clock = Clock(sigmas, flow=True)
    n = data.draw(st.integers(0, len(sigmas) - 2))
    share = data.draw(st.floats(0.05, 0.95))
    sigma = sigmas[n] + share * (sigmas[n + 1] - sigmas[n])
    assume(sigmas[n] > sigma * (1 + 2 * CLOSE) and sigma > sigmas[n + 1] * (1 + 2 * CLOSE))
    place = clock.place(sigma)
    assert n < place < n + 1 and place == pytest.approx(n + share, abs=1e-3)
    assert clock.tick(sigma).index in (n, n + 1 if share > 1 - 2 * CLOSE else n)


@given(schedules(), st.lists(st.floats(0, 120), min_size=2, max_size=20))
def test_places_fall_with_the_sigma_and_stay_in_the_schedule(sigmas, others):
    clock = Clock(sigmas, flow=False)
    places = [clock.place(sigma) for sigma in sorted(others, reverse=True)]
    assert all(later >= earlier - 1e-3 for earlier, later in zip(places, places[1:], strict=False))
    assert all(0 <= place <= len(sigmas) - 1 for place in places)
    assert all(0 <= clock.tick(sigma).index <= len(sigmas) - 2 for sigma in others)


@given(schedules())
def test_sigmas_that_went_through_float32_and_back_are_the_same_place(sigmas):
    clock = Clock(sigmas, flow=True)
    assert [clock.place(sigma * (1 + 3e-7)) for sigma in sigmas[:-1]] == list(range(len(sigmas) - 1))


@given(schedules())
def test_the_gaps_of_the_steps_add_up_to_the_schedule(sigmas):
    clock = Clock(sigmas, flow=True)
    gaps = [clock.tick(sigma).gap for sigma in sigmas[:-1]]
    assert sum(gaps) == pytest.approx(sigmas[0] - sigmas[-1]) and min(gaps) >= 0


@given(schedules())
def test_gaps_of_the_variance_exploding_form_add_up_in_what_is_left_of_x_there(sigmas):
    clock = Clock(sigmas, flow=False)
    steps = [clock.tick(sigma) for sigma in sigmas[:-1]]
    assert sum(step.gap for step in steps) == pytest.approx(math.log((1 + sigmas[0]) / (1 + sigmas[-1]))) and min(step.gap for step in steps) >= 0
    assert all(0 <= later.noise <= before.noise <= 1 for before, later in pairwise(steps))


@given(schedules(), st.data())
def test_an_evaluation_between_two_sigmas_covers_the_step_that_it_is_in(sigmas, data):
    n = data.draw(st.integers(0, len(sigmas) - 2))
    for flow in (True, False):
        clock = Clock(sigmas, flow)
        between = clock.tick((sigmas[n] + sigmas[n + 1]) / 2)
        assert between.gap == clock.tick(sigmas[between.index]).gap


@pytest.mark.parametrize(("sigma", "flow", "noise"), [(0.7, True, 0.7), (1.0, False, 0.5), (14.6, False, 14.6 / 15.6)])
def test_the_share_of_noise_is_that_of_the_parameterisation(sigma, flow, noise):
    assert Clock([sigma, 0.0], flow).tick(sigma).noise == pytest.approx(noise)


@given(st.floats(0.02, 100), st.integers(2000, 4000))
def test_a_step_of_the_variance_exploding_form_counts_as_that_of_a_flow_with_its_larger_error(sigma, steps):
    """The same model in both forms: an error of 1 in its derivative is one of 1 + sigma in that of the flow."""
    flow = [1 - n / steps for n in range(1, steps + 1)]
    exploding = [t / (1 - t) for t in flow]
    n = min(range(steps - 1), key=lambda n: abs(exploding[n] - sigma))
    wide, same = Clock(exploding, flow=False).tick(exploding[n]).gap, Clock(flow, flow=True).tick(flow[n]).gap
    assert same == pytest.approx(1 / steps) and wide == pytest.approx((1 + exploding[n]) / steps, rel=0.1)


def test_a_second_stage_of_a_step_is_not_another_step_and_does_not_rise():
    clock = Clock([1.0, 0.6, 0.3, 0.0], flow=True)
    steps = [clock.tick(sigma) for sigma in (1.0, 0.6, 0.6, 0.3, 0.3)]
    assert [step.place for step in steps] == [0, 1, 1, 2, 2] and [step.evaluation for step in steps] == [0, 1, 2, 3, 4]
    assert not any(step.rises for step in steps) and [step.last for step in steps] == [False, False, False, True, True]


@pytest.mark.parametrize(("before", "now", "rises"), [
    (0.3, 0.6, True), (0.6, 0.6, False), (0.6, 0.600001, False), (0.6, 0.601, True), (0.6, 0.3, False)])
def test_a_sigma_above_the_one_before_rises(before, now, rises):
    clock = Clock([1.0, 0.6, 0.3, 0.0], flow=True)
    clock.tick(before)
    assert clock.tick(now).rises is rises


@given(st.floats(0, 1), st.floats(0, 1))
def test_log_snr_of_a_flow_falls_with_sigma_and_is_bounded(a, b):
    clock = Clock([1.0, 0.0], flow=True)
    low, high = sorted((a, b))
    assert clock.log_snr(low) >= clock.log_snr(high) and abs(clock.log_snr(a)) < 7
    assert clock.log_snr(0.5) == pytest.approx(0)


@given(st.floats(0.01, 200))
def test_log_snr_of_the_variance_exploding_form_is_minus_the_log_of_sigma(sigma):
    assert Clock([14.6, 0.0], flow=False).log_snr(sigma) == pytest.approx(-math.log(sigma))


def test_the_last_step_is_known_where_the_last_sigma_repeats():
    clock = Clock([1.0, 0.5, 0.25, 0.0625, 0.0625, 0.0625, 0.0], flow=True)
    assert [clock.tick(sigma).last for sigma in (1.0, 0.5, 0.25, 0.0625)] == [False, False, False, True]


def test_steps_at_the_end_that_do_nothing_are_told():
    """kl_optimal ends a hair above 0, so its last step but one is the last that makes a picture."""
    assert [Clock(sigmas, True).idle for sigmas in ([1.0, 0.5, 0.0], [1.0, 0.5, 4e-5, 0.0], [1.0, 0.5, 1e-3, 1e-5, 0.0], [1e-3, 1e-4, 0.0])] == [0, 1, 2, 0]
    assert Clock([14.0, 0.03, 0.0], False).idle == 0 and Clock([700.0, 1.0, 0.002, 0.0], False).idle == 1


def test_whether_a_schedule_falls_from_each_sigma_to_the_next():
    assert Clock([1.0, 0.5, 0.0], True).falls and not any(Clock(sigmas, True).falls for sigmas in ([1.0, 0.5, 0.5, 0.0], [1.0, 0.5, 0.8, 0.0]))


def test_the_last_step_before_sigma_rises_is_told():
    clock = Clock([1.0, 0.6, 0.2, 0.7, 0.3, 0.0], True)
    steps = [clock.tick(sigma) for sigma in clock.sigmas[:-1]]
    assert [step.turns for step in steps] == [False, False, True, False, False] and [step.rises for step in steps] == [False, False, False, True, False]
    assert not any(Clock([1.0, 0.5, 0.5, 0.0], True).tick(sigma).turns for sigma in (1.0, 0.5))


# rises ---------------------------------------------------------------------------------------------------------------
RISING = [1.0, 0.8, 0.6, 0.4, 0.7, 0.5, 0.3, 0.6, 0.4, 0.2, 0.0]     # with rises from 0.4 and from 0.3


def stages(sigmas, often: int):
    """What a sampler evaluates at: the sigmas; each next one too, as Heun's; or the geometric mean in between, as DPM-Solver-2's."""
    for now, following in pairwise(sigmas):
        yield now
        if often == 2 and following > 0:
            yield following
        elif often == 3 and following > 0:
            yield math.sqrt(now * following)


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("often", [1, 2, 3], ids=["once", "heun", "dpm_2"])
def test_an_evaluation_knows_whether_sigma_rises_later_even_where_it_takes_the_same_values_again(often, flow):
    clock = Clock(RISING, flow)
    steps = [clock.tick(sigma) for sigma in stages(RISING, often)]
    last = max(n for n, (before, now) in enumerate(pairwise(steps)) if now.sigma > before.sigma and before.sigma == 0.3)
    assert [step.rises_later for step in steps] == [n <= last for n in range(len(steps))]


@given(schedules(), st.booleans())
def test_in_a_schedule_that_falls_sigma_never_rises_later(sigmas, flow):
    clock = Clock(sigmas, flow)
    assert clock.descends and not any(clock.tick(sigma).rises_later for sigma in sigmas)


def test_where_churn_raises_sigma_on_the_way_a_rise_of_the_schedule_is_still_to_come():
    """Nothing tells that it is over, so all of the run counts as before it."""
    clock = Clock(RISING, True)
    assert all(clock.tick(sigma * 1.2).rises_later for sigma in RISING[:-1])


@pytest.mark.parametrize("flow", [True, False])
def test_a_sigma_below_zero_has_no_noise(flow):
    clock = Clock([1.0, 0.5, -0.2, -0.4], flow)
    assert [clock.tick(sigma).noise for sigma in (-0.2, -0.4)] == [0.0, 0.0]
