"""Policies, over the registry, and each by its own formula."""
import inspect
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pack.core.step import Clock
from pack.core.stepcache.governor import FEWEST_STEPS, Governor, stand_down
from pack.core.stepcache.policies import POLICIES, View
from pack.core.stepcache.policies.error_control import ErrorControl
from pack.core.stepcache.policies.first_block import FirstBlock
from pack.core.stepcache.policies.interval import Interval

CLOCK = Clock([1 - n / 20 for n in range(21)], flow=True)
STEPS = [CLOCK.tick(1 - n / 20) for n in range(20)]


def view(at: int = 8, computed=(0, 4, 7), **more) -> View:
    return replace(View(STEPS[at], tuple(STEPS[n] for n in computed), predicted=0.01, owed=0.0, drift=0.05), **more)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_is_immutable_answers_yes_or_no_and_cites_its_source(policy):
    entry = policy()
    assert isinstance(entry.skip(view()), bool) and isinstance(policy.needs_forward, bool)
    assert isinstance(entry.skip(view(predicted=None, drift=None)), bool), "nothing is known at first"
    for field in fields(entry):
        with pytest.raises(FrozenInstanceError):
            setattr(entry, field.name, 0)
    assert hash(entry) == hash(policy()) and inspect.getdoc(inspect.getmodule(policy))


def test_error_control_skips_while_the_sum_of_expected_errors_fits():
    policy = ErrorControl(tolerance=0.03)
    assert policy.skip(view(predicted=0.02, owed=0.005)) and not policy.skip(view(predicted=0.02, owed=0.011))
    assert not policy.skip(view(predicted=None)) and not policy.skip(view(predicted=float("inf"))) and not policy.skip(view(predicted=float("nan")))
    assert not ErrorControl(tolerance=0.0).skip(view(predicted=0.0))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_error_control_with_a_larger_tolerance_skips_whatever_a_smaller_one_does(a, b, predicted, owed):
    low, high = sorted((a, b))
    now = view(predicted=predicted, owed=owed)
    assert ErrorControl(high).skip(now) or not ErrorControl(low).skip(now)


def test_first_block_skips_below_its_threshold():
    policy = FirstBlock(threshold=0.12)
    assert policy.skip(view(drift=0.119)) and not policy.skip(view(drift=0.12)) and not policy.skip(view(drift=None))
    assert not policy.skip(view(drift=float("nan"))) and not FirstBlock(threshold=0.0).skip(view(drift=0.0))


@pytest.mark.parametrize(("interval", "warm_up", "wanted"), [
    (1, 1, "." * 20), (2, 3, "...s.s.s.s.s.s.s.s.s"), (3, 3, "...ss.ss.ss.ss.ss.ss"), (5, 1, ".ssss.ssss.ssss.ssss"), (20, 2, ".." + "s" * 18)])
def test_interval_computes_the_first_steps_and_then_every_nth(interval, warm_up, wanted):
    policy, computed, got = Interval(interval, warm_up), [0], "."
    for n in range(1, 20):
        skips = policy.skip(view(n, tuple(computed)))
        got += "s" if skips else "."
        computed += [] if skips else [n]
    assert got == wanted


GOVERNOR = Governor(start_sigma=0.8, end_sigma=0.3, max_skips=3)


@pytest.mark.parametrize(("at", "computed", "skips", "why"), [
    (8, (0, 7), 0, ""), (8, (), 0, "first step"), (19, (0, 7), 0, "last step"), (2, (0,), 0, "outside start and end"),
    (16, (0, 7), 0, "outside start and end"), (4, (0,), 0, ""), (14, (0,), 2, ""), (8, (0, 4), 3, "most skips in a row")])
def test_the_governor_says_why_a_step_may_not_be_skipped(at, computed, skips, why):
    assert GOVERNOR.must_compute(STEPS[at], tuple(STEPS[n] for n in computed), skips) == why


def test_reasons_to_stand_down():
    assert stand_down(FEWEST_STEPS, {"reprise.step_cache", "someone"}, {"patches"}) == ""
    assert "8 step" in stand_down(FEWEST_STEPS - 1, set(), set())
    assert "nunchaku" in stand_down(20, set(), set(), "ComfyFluxWrapper")
    assert "EasyCache" in stand_down(20, {"easycache"}, set()) and "LazyCache" in stand_down(20, {"lazycache"}, set())
    assert "TeaCache" in stand_down(20, set(), {"rel_l1_thresh"})
