"""Policies, over the registry, and each by its own formula."""
import inspect
import math
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from views import NOT_A_NUMBER, STEPS, Signal, steps_of, view, walk

from pack.core.families import FAMILIES
from pack.core.knob import checked
from pack.core.stepcache.governor import FEWEST_STEPS, Governor, stand_down
from pack.core.stepcache.policies import POLICIES, schedule, zeus
from pack.core.stepcache.policies.cg_taylor import CGTaylor
from pack.core.stepcache.policies.error_control import ErrorControl
from pack.core.stepcache.policies.first_block import FirstBlock
from pack.core.stepcache.policies.interval import Interval
from pack.core.stepcache.policies.magcache import MagCache
from pack.core.stepcache.policies.schedule import Schedule
from pack.core.stepcache.policies.temporal_delta import TemporalDelta
from pack.core.stepcache.policies.zeus import Zeus
from pack.core.stepcache.signal import FIRST_BLOCK, MODEL_INPUT, MODULATED_INPUT, NOTHING, OUTPUT, Flow, Watch, signal_of


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_is_immutable_answers_yes_or_no_and_cites_its_source(policy):
    entry = policy()
    assert signal_of(policy) in (NOTHING, FIRST_BLOCK, MODULATED_INPUT, MODEL_INPUT, OUTPUT)
    assert policy.needs_forward is (signal_of(policy) in (FIRST_BLOCK, MODULATED_INPUT))
    assert isinstance(entry.skip(view()), bool)
    assert isinstance(entry.skip(view(predicted=None, signal=Watch(signal_of(policy)))), bool), "nothing is known at first"
    for field in fields(entry):
        with pytest.raises(FrozenInstanceError):
            setattr(entry, field.name, 0)
    assert hash(entry) == hash(policy()) and len(inspect.getdoc(inspect.getmodule(policy))) > 120


WATCHING = [policy for policy in POLICIES.values() if signal_of(policy)]
THRESHOLD = {"error control": "tolerance", "CG-Taylor": "gate"}


@pytest.mark.parametrize("policy", WATCHING, ids=lambda policy: policy.name)
def test_what_is_not_known_or_not_a_number_is_computed(policy):
    liberal = policy(**{THRESHOLD.get(policy.name, "threshold"): 1.0})
    assert liberal.skip(view()), "else this proves nothing"
    assert not liberal.skip(view(signal=Watch(policy.signal))) and not liberal.skip(view(signal=NOT_A_NUMBER))


@pytest.mark.parametrize("policy", [*WATCHING, ErrorControl, MagCache], ids=lambda policy: policy.name)
@given(signal=st.builds(
    Signal, st.floats(0, 2), st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
    st.builds(Flow, st.floats(0, 2), st.floats(0, 2), st.floats(0, 2), st.floats(0, 2)), st.floats(0, 2), st.floats(0, 2)),
    at=st.integers(8, 18), family=st.sampled_from(["flux", "ltxv", "hunyuan_video"]))
def test_a_threshold_of_zero_skips_nothing(policy, signal, at, family):
    assert not policy(**{THRESHOLD.get(policy.name, "threshold"): 0.0}).skip(view(at, signal=signal, family=family))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_that_refuses_a_run_skips_nothing_in_it_and_says_why_in_one_sentence(policy):
    entry = policy()
    for family in [*FAMILIES, "wan", "unheard-of"]:
        for count in (9, 12, 20, 50):
            steps, refuses = steps_of(count), getattr(entry, "refuses", lambda *run: "")
            why = refuses(family, count, "euler")
            assert isinstance(why, str) and not why.endswith(".") and "\n" not in why
            if why:
                assert not any(entry.skip(view(n, (0,), steps, family=family)) for n in range(1, count))


def test_error_control_skips_while_the_sum_of_expected_errors_fits():
    policy = ErrorControl(tolerance=0.03)
    share = 0.03 * math.sqrt(2 / 20)      # of one skip among 20 steps
    assert policy.skip(view(predicted=share * 0.7, owed=share * 0.29)) and not policy.skip(view(predicted=share * 0.7, owed=share * 0.31))
    assert policy.skip(view(predicted=share * 1.2, owed=0.0, skipped=1)), "a longer group may use up more"
    assert not policy.skip(view(predicted=None)) and not policy.skip(view(predicted=float("inf"))) and not policy.skip(view(predicted=float("nan")))
    assert not ErrorControl(tolerance=0.0).skip(view(predicted=0.0))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_error_control_with_a_larger_tolerance_skips_whatever_a_smaller_one_does(a, b, predicted, owed):
    low, high = sorted((a, b))
    now = view(predicted=predicted, owed=owed)
    assert ErrorControl(high).skip(now) or not ErrorControl(low).skip(now)


def test_first_block_skips_below_its_threshold():
    policy = FirstBlock(threshold=0.12)
    assert policy.skip(view(signal=Signal(drift=0.119))) and not policy.skip(view(signal=Signal(drift=0.12)))
    assert not FirstBlock(threshold=0.0).skip(view(signal=Signal(drift=0.0)))


@given(st.floats(0, 2), st.floats(0.001, 2), st.integers(1, 19))
def test_cg_taylor_skips_while_the_forecast_is_nearer_than_the_gate_after_the_warm_up(error, gate, at):
    policy = CGTaylor(gate=gate, warm_up=5)
    assert policy.skip(view(at, (0,), signal=Signal(error=error))) == (at >= 5 and error < gate)


def test_cg_taylor_asks_for_the_forecast_of_its_order():
    asked = []

    class Asked(Signal):
        def forecast_error(self, order):
            asked.append(order)
            return 0.0

    for order in (1, 2, 3):
        assert CGTaylor(order=order).skip(view(signal=Asked()))
    assert asked == [1, 2, 3]


@pytest.mark.parametrize("preset", zeus.PRESETS)
def test_zeus_at_the_published_number_of_steps_is_the_published_schedule(preset):
    start, end, denominator, modular, late, interval = zeus.PRESETS[preset]
    wanted = [True] * 50
    for i in range(start, late):
        wanted[i] = str(i % denominator) not in modular.split(",")
    for i in range(late, end):
        wanted[i] = i % interval == 0
    assert walk(Zeus(preset), steps_of(50)) == wanted
    own = Zeus("custom", start, end, denominator, modular, late, interval)
    assert walk(own, steps_of(50)) == wanted


@pytest.mark.parametrize("count", [12, 20, 28, 100])
def test_zeus_is_stretched_to_the_steps_of_the_run(count):
    decisions = walk(Zeus("SDXL"), steps_of(count))
    assert all(decisions[:max(3, round(0.2 * count))]) and all(decisions[round(0.9 * count):])
    assert 0.4 < sum(decisions) / count < 0.75
    late = max(n for n in range(count) if not decisions[n])
    within = range(max(3, round(0.2 * count)), late - 2)
    assert not any(all(decisions[n:n + 3]) for n in within), "two computed in a row are where the early part meets the late one"


def test_zeus_wants_twelve_steps():
    assert Zeus().refuses("flux", 11, "euler") and not Zeus().refuses("flux", 12, "euler")


@pytest.mark.parametrize(("preset", "wanted"), [
    ("slow", "11111111 0 111 00 111 00 11 00 1 000 1"), ("medium", "111111 0 11 000 11 000 11 000 11 000 1"),
    ("fast", "111111 0 1 000 1 0000 1 00000 1 0000 1"), ("ultra", "1111 00 1 00000 1 000000 1 0000000 1")])
def test_a_schedule_at_28_steps_is_the_published_mask(preset, wanted):
    assert walk(Schedule(preset), steps_of(28)) == [digit == "1" for digit in wanted.replace(" ", "")]


@pytest.mark.parametrize("preset", schedule.PRESETS)
@pytest.mark.parametrize("count", [9, 20, 50])
def test_a_preset_schedule_is_stretched_to_the_steps_of_the_run(preset, count):
    decisions, published = walk(Schedule(preset), steps_of(count)), walk(Schedule(preset), steps_of(28))
    assert abs(sum(decisions) / count - sum(published) / 28) < max(0.1, 1.5 / count) and decisions[0] and decisions[-1]


@given(st.lists(st.booleans(), min_size=10, max_size=60))
def test_a_schedule_of_ones_and_zeros_is_followed_to_the_letter_and_made_from_indices_too(wanted):
    wanted[0] = wanted[-1] = True
    text = ",".join(str(int(computed)) for computed in wanted)
    steps = steps_of(len(wanted))
    assert walk(Schedule("custom", text), steps) == wanted
    made = Schedule.of([n for n, computed in enumerate(wanted) if computed], len(wanted))
    assert walk(made, steps) == wanted and checked(made) == Schedule("custom", text)


def test_a_schedule_of_runs_computes_and_skips_in_turn():
    assert walk(Schedule("custom", "3, 2,1,4, 1"), steps_of(11)) == [bool(int(n)) for n in "11100100001"]


def test_a_schedule_for_another_number_of_steps_is_refused():
    own = Schedule("custom", "1,1,0,1")
    assert own.refuses("flux", 20, "euler") == "the schedule is one of 4 steps and the run has 20" and own.refuses("flux", 4, "euler") == ""
    assert not any(own.skip(view(n, (0,))) for n in range(1, 20))
    assert Schedule("slow", "1,1,0,1").refuses("flux", 20, "euler") == "", "the list is not used"
    with pytest.raises(ValueError, match="step 20 is to be computed and the run has steps 0 to 19"):
        Schedule.of((0, 20), 20)


@pytest.mark.parametrize("text", ["", "1", "1;0", "1,,0", "a,b", "1,-1", "1.0,0", "²,1"])
def test_a_schedule_that_is_none_is_told_what_it_should_be(text):
    with pytest.raises(ValueError, match="schedule: steps is '.*'; expected whole numbers with commas"):
        checked(Schedule("custom", text))


@given(st.floats(0, 1), st.floats(0.001, 1), st.integers(1, 4), st.integers(1, 6))
def test_temporal_delta_adds_its_change_up_over_skipped_steps_and_stops_after_so_many(change, threshold, most, since):
    policy = TemporalDelta(threshold, most)
    now = view(10 + since, (4, 10), signal=Signal(output_change=change))
    grown = (STEPS[10 + since].place - STEPS[10].place) * change
    assert policy.skip(now) == (since <= most and grown < threshold)


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


def falling(steps: int) -> list[float]:
    return [1 - n / steps for n in range(steps + 1)]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_schedule_with_what_is_no_number_is_left_to_the_sampler(wrong):
    for at in (0, 7, 20):
        sigmas = falling(20)
        sigmas[at] = wrong
        assert f"sigma {at} is {wrong}, so where the run is cannot be told" in stand_down(sigmas, set(), set())


def test_reasons_to_stand_down():
    assert stand_down(falling(FEWEST_STEPS), {"reprise.step_cache", "someone"}, {"patches"}) == ""
    assert "8 step" in stand_down(falling(FEWEST_STEPS - 1), set(), set())
    assert "nunchaku" in stand_down(falling(20), set(), set(), "ComfyFluxWrapper")
    assert "EasyCache" in stand_down(falling(20), {"easycache"}, set()) and "LazyCache" in stand_down(falling(20), {"lazycache"}, set())
    assert "TeaCache" in stand_down(falling(20), set(), {"rel_l1_thresh"}) and "MagCache" in stand_down(falling(20), set(), {"magcache_thresh"})
