"""Published schedules: centred interval against its formula written with numpy, and key steps."""
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pack.core.step import Clock
from pack.core.stepcache.policies import View
from pack.core.stepcache.policies.centred import CentredInterval, centred
from pack.core.stepcache.policies.key_steps import KEY_STEPS, OF, KeySteps


def schedule(policy, steps: int, places=None) -> list[float]:
    """The places that a policy computes, the first one included."""
    clock = Clock([1 - n / steps for n in range(steps + 1)], flow=True)
    computed = []
    for place in places if places is not None else range(steps):
        step = clock.tick(1 - place / steps)
        if not computed or not policy.skip(View(step, tuple(computed), None, 0.0)):
            computed.append(step)
    return [step.place for step in computed]


@given(st.integers(9, 100), st.integers(2, 20), st.floats(0, 1), st.floats(1.0, 3.0))
def test_a_centred_schedule_has_the_steps_that_the_interval_promises(steps, interval, share, power):
    told = centred(steps, interval, round(share * steps), power)
    assert told[0] == 0 and len(told) == ceil(steps / interval) and told[-1] < steps
    assert all(a < b for a, b in zip(told, told[1:], strict=False))


@pytest.mark.parametrize(("steps", "interval", "centre", "power"), [
    (50, 5, 15, 1.4), (50, 10, 15, 1.4), (50, 5, 10, 1.2), (30, 3, 9, 1.4), (28, 4, 14, 1.6), (100, 5, 31, 1.3), (20, 5, 0, 1.2), (25, 2, 25, 1.8)])
def test_the_centred_schedule_is_that_of_the_formula(steps, interval, centre, power):
    wanted = ceil(steps / interval)
    for p in np.arange(power, 1, -0.02):
        spaced = np.linspace(complex(-centre) ** (1 / p), complex(steps - centre) ** (1 / p), wanted + 1)
        inner = np.unique((spaced ** p).real.astype(np.int32))[1:-1] + centre
        if len(inner) == wanted - 1:
            assert centred(steps, interval, centre, power) == (0, *inner)
            return
    assert centred(steps, interval, centre, power) == tuple(np.arange(wanted) * steps // wanted)


def test_the_published_setting_gives_the_published_steps():
    """Stable Diffusion 1.5: 50 steps, N 5, p 1.4, c 15."""
    assert schedule(CentredInterval(), 50) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]


def test_steps_are_densest_around_the_centre_and_even_at_power_1():
    gaps = np.diff([*schedule(CentredInterval(interval=5, centre=0.5, power=1.6), 100), 100])
    assert gaps[len(gaps) // 2] < gaps[0] and gaps[len(gaps) // 2] < gaps[-1]
    assert set(np.diff(schedule(CentredInterval(interval=5, power=1.0), 100))) == {5}


def test_an_interval_of_one_skips_nothing():
    assert schedule(CentredInterval(interval=1), 20) == list(range(20))


@pytest.mark.parametrize(("steps", "wanted"), [
    (50, list(KEY_STEPS)), (100, [2 * key for key in KEY_STEPS]), (25, [0, 1, 2, 3, 5, 8, 13, 18]), (20, [0, 1, 2, 4, 6, 10, 14])])
def test_key_steps_are_stretched_to_the_run(steps, wanted):
    assert OF == 50 and schedule(KeySteps(), steps) == wanted


@pytest.mark.parametrize("policy", [KeySteps(), CentredInterval()])
def test_a_key_step_that_a_sampler_steps_over_is_made_up_for_at_once(policy):
    """Samplers of higher order evaluate between the steps of the schedule."""
    keys = schedule(policy, 50)
    off = schedule(policy, 50, [n + 0.4 for n in range(50)])
    assert off == pytest.approx([key + 0.4 for key in keys])
    twice = schedule(policy, 50, [n / 2 for n in range(100)])
    assert twice == keys, "the stage between two steps is a skip"
