"""The policy profile: bound to a run it computes the steps of its plan, or nothing less."""
from dataclasses import replace

import pytest
import torch

from pack.core.knob import checked
from pack.core.step import Clock
from pack.core.stepcache.policies.base import View
from pack.core.stepcache.policies.profile import FromProfile, aim, no_aim
from pack.core.stepcache.profiles import Check, Facts, Profile

STEPS = 20
FACTS = Facts("flux", "Flux", "euler", tuple(1 - n / STEPS for n in range(STEPS + 1)), (16, 64, 64), 1.0, "float32")


CHECKS = (Check(10, 0.01, 0.02),)


def profile(checks=CHECKS) -> Profile:
    d = torch.randn(STEPS, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).cumsum(0).cumsum(0)
    return Profile(FACTS, True, d @ d.T / d[-1].square().sum(), 1, checks=checks)


def bound(policy=None, made=None, run=FACTS, longest=9, may_skip=None, looks_back=True):
    made = made or profile()
    return (policy or FromProfile()).bound(lambda name: made, run, longest, may_skip or [True] * STEPS, looks_back)


def decisions(policy) -> list[int]:
    """The steps that it computes."""
    clock = Clock(list(FACTS.sigmas), True)
    steps = [clock.tick(sigma) for sigma in FACTS.sigmas[:-1]]
    return [n for n, step in enumerate(steps) if not policy.skip(View(step, (steps[0],), None, 0.0))]


@pytest.mark.parametrize(("text", "meaning"), [
    ("2.0x", ("speed-up", 2.0)), (" 3X ", ("speed-up", 3.0)), ("1x", ("speed-up", 1.0)), ("0.03", ("tolerance", 0.03)), ("0", ("tolerance", 0.0)), ("", None),
    ("x", None), ("0.5x", None), ("51x", None), ("1.5", None), ("-0.1", None), ("nan", None), ("nanx", None), ("infx", None), ("2 x 3", None), ("fast", None),
    ("２x", None), ("1_0x", None), ("2.x", ("speed-up", 2.0)), (".5", ("tolerance", 0.5)), ("1e-3", ("tolerance", 0.001)), ("1e999", None),
    (0.03, ("tolerance", 0.03)), (0, ("tolerance", 0.0)), (5, None), (2.0, None), (float("nan"), None), (True, None), (None, None), ([], None)])
def test_a_target_is_a_speed_up_or_a_tolerance_and_nothing_else(text, meaning):
    assert aim(text) == meaning and bool(no_aim(text)) is (meaning is None)


@pytest.mark.parametrize("wrong", [{"target": "fast"}, {"target": 5}, {"target": None}, {"profile": "../x"}, {"max_group": 0}])
def test_wrong_knobs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        checked(FromProfile(**wrong))


@pytest.mark.parametrize("speed_up", [1.0, 1.3, 2.0, 2.5, 3.3])
def test_a_speed_up_computes_exactly_that_many_steps_and_the_best_ones(speed_up):
    policy = bound(FromProfile(target=f"{speed_up}x"))
    plans = profile().plans(5, [True] * STEPS, True)
    assert decisions(policy) == list(plans[int(STEPS / speed_up + 0.5)].computed)
    assert policy.refuses("flux", STEPS, "euler") == "" and policy.note == ""


def test_a_speed_up_that_the_limits_forbid_comes_as_near_as_they_allow_and_says_so():
    policy = bound(FromProfile(target="10x"), longest=2)
    assert len(decisions(policy)) == 8 and "10x is 2 of 20 steps, and no fewer than 8" in policy.note


@pytest.mark.parametrize(("knob", "given", "most"), [(5, 9, 5), (3, 9, 3), (5, 2, 2), (20, 1, 1)])
def test_groups_are_no_longer_than_the_knob_and_the_run_allow(knob, given, most):
    computed = decisions(bound(FromProfile(target="50x", max_group=knob), longest=given))
    assert max(b - a - 1 for a, b in zip(computed, computed[1:], strict=False)) == most


def test_what_the_run_forbids_to_skip_is_computed():
    may_skip = [n not in (4, 5, 6, 13) for n in range(STEPS)]
    assert {0, 4, 5, 6, 13, 19} <= set(decisions(bound(FromProfile(target="3x"), may_skip=may_skip)))


@pytest.mark.parametrize("tolerance", [0.0, 0.001, 0.01, 0.05, 0.3, 1.0])
def test_a_tolerance_computes_the_fewest_steps_whose_expected_error_fits(tolerance):
    made = profile()
    plans = made.plans(5, [True] * STEPS, True)
    computed = decisions(bound(FromProfile(target=str(tolerance)), made))
    assert made.expected(plans[len(computed)]) <= tolerance
    assert all(made.expected(plan) > tolerance for count, plan in plans.items() if count < len(computed))
    assert (len(computed) == STEPS) is (tolerance == 0.0) or tolerance == 0.001


def test_a_tolerance_means_the_error_that_checks_measured():
    few, many = (len(decisions(bound(FromProfile(target="0.02"), profile((Check(10, 0.01, measured),))))) for measured in (0.002, 0.05))
    assert few < many


def test_a_tolerance_without_checks_is_refused_and_a_speed_up_is_not():
    assert "no check runs" in bound(FromProfile(target="0.1"), profile(())).refuses("flux", STEPS, "euler")
    assert len(decisions(bound(FromProfile(target="2x"), profile(())))) == 10


@pytest.mark.parametrize(("field", "value"), [
    ("family", "wan"), ("model", "X"), ("precision", "float16"), ("sampler", "heun"), ("sigmas", FACTS.sigmas[1:]), ("shape", (16, 128, 128)), ("cfg", 3.0)])
def test_a_run_that_the_profile_was_not_made_for_is_computed_in_full_and_the_field_is_named(field, value):
    policy = bound(run=replace(FACTS, **{field: value}))
    why = policy.refuses("flux", STEPS, "euler")
    assert decisions(policy) == list(range(STEPS)) and "profile 'calibrated' does not fit by its " in why
    assert {"sigmas": "steps", "shape": "resolution"}.get(field, field) in why and not why.endswith(".")


def test_a_profile_that_cannot_be_read_is_a_reason_and_no_error():
    def missing(name):
        raise ValueError(f"there is no profile '{name}'")

    policy = FromProfile().bound(missing, FACTS, 5, [True] * STEPS, True)
    assert policy.refuses("flux", STEPS, "euler") == "there is no profile 'calibrated'" and decisions(policy) == list(range(STEPS))


def test_before_a_run_a_check_raises_for_what_is_known_by_then():
    known = {"family": "flux", "model": "Flux", "precision": "float32"}
    FromProfile().check(lambda name: profile(), **known)
    for field in known:
        with pytest.raises(ValueError, match=f"does not fit by its {field}"):
            FromProfile().check(lambda name: profile(), **{**known, field: "other"})


def test_unbound_it_skips_nothing_and_says_so():
    assert decisions(FromProfile()) == list(range(STEPS)) and "was not read" in FromProfile().refuses("flux", STEPS, "euler")
