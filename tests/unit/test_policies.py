"""Policies, over the registry, and each by its own formula."""
import inspect
import math
import random
from dataclasses import FrozenInstanceError, dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pack.core.families import FAMILIES
from pack.core.knob import checked
from pack.core.step import Clock
from pack.core.stepcache.governor import FEWEST_STEPS, Governor, stand_down
from pack.core.stepcache.policies import POLICIES, View, schedule, zeus
from pack.core.stepcache.policies.cg_taylor import CGTaylor
from pack.core.stepcache.policies.easycache import EasyCache
from pack.core.stepcache.policies.error_control import ErrorControl
from pack.core.stepcache.policies.first_block import FirstBlock
from pack.core.stepcache.policies.interval import Interval
from pack.core.stepcache.policies.magcache import CURVES, MagCache, nearest
from pack.core.stepcache.policies.schedule import Schedule
from pack.core.stepcache.policies.teacache import COEFFICIENTS, TeaCache
from pack.core.stepcache.policies.temporal_delta import TemporalDelta
from pack.core.stepcache.policies.zeus import Zeus
from pack.core.stepcache.signal import FIRST_BLOCK, MODEL_INPUT, MODULATED_INPUT, NOTHING, OUTPUT, Flow, Watch, signal_of


def steps_of(count: int):
    clock = Clock([1 - n / count for n in range(count + 1)], flow=True)
    return [clock.tick(1 - n / count) for n in range(count)]


STEPS = steps_of(20)


@dataclass(frozen=True)
class Signal:
    """What a test lets a policy see."""

    drift: float | None = 0.05
    changes: tuple = (0.05, 0.05)
    flow: Flow | None = Flow(1.0, 0.1, 1.0, 1.0)
    output_change: float | None = 0.05
    error: float | None = 0.05

    def forecast_error(self, order):
        return self.error


NOT_A_NUMBER = Signal(math.nan, (0.1, math.nan), Flow(1.0, math.nan, math.nan, math.nan), math.nan, math.nan)


def view(at: int = 8, computed=(0, 4, 7), steps=STEPS, signal=None, **more) -> View:
    family = more.pop("family", "flux")
    signal = signal or Signal()
    return replace(View(steps[at], tuple(steps[n] for n in computed), predicted=0.01, owed=0.0, family=family, signal=signal), **more)


def walk(policy, steps, told=lambda n, computed: Signal(), forced=()) -> list[bool]:
    """Computed or not, over a run: the first, the last and `forced` steps are computed whatever the policy says."""
    computed = [0]
    for n in range(1, len(steps)):
        skips = policy.skip(view(n, tuple(computed), steps, signal=told(n, computed)))
        if not skips or n == len(steps) - 1 or n in forced:
            computed.append(n)
    return [n in computed for n in range(len(steps))]


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


def teacache_loop(coefficients, absolute, warm_up, threshold, drifts, forced):
    """The published loop: a sum that lives on from call to call, set to zero whenever everything is computed."""
    rescale, accumulated, decisions = np.poly1d(coefficients), 0.0, []
    for n, drift in enumerate(drifts):
        if n < warm_up or n == len(drifts) - 1 or n in forced:
            compute, accumulated = True, 0.0
        else:
            accumulated += abs(rescale(drift)) if absolute else rescale(drift)
            compute = accumulated >= threshold
            if compute:
                accumulated = 0.0
        decisions.append(compute)
    return decisions


def changes_of(drifts):
    return lambda n, computed: Signal(changes=tuple(drifts[computed[-1] + 1:n + 1]))


@pytest.mark.parametrize("name", COEFFICIENTS.sets)
def test_teacache_decides_as_the_published_loop_does(name):
    told, mixed = COEFFICIENTS.sets[name], 0
    for seed in range(12):
        chance = random.Random(seed)
        drifts = [chance.uniform(0.0, 0.3) * chance.random() for _ in range(50)]
        forced = {n for n in range(50) if chance.random() < 0.1}
        estimates = np.abs(np.poly1d(told["coefficients"])(drifts))
        threshold = float(np.median(estimates)) * chance.uniform(0.5, 6)
        wanted = teacache_loop(told["coefficients"], "flux" in name, 5 if "ret_mode" in name else 1, threshold, drifts, forced)
        assert walk(TeaCache(threshold, name), steps_of(50), changes_of(drifts), forced) == wanted
        mixed += 3 < sum(wanted) < 47
    assert mixed >= 4


def test_teacache_takes_the_polynomial_of_the_family_and_knows_when_there_is_none():
    drift = 0.08
    for family, name in (("flux", "flux"), ("ltxv", "ltxv"), ("hunyuan_video", "hunyuan_video")):
        value = abs(np.poly1d(COEFFICIENTS.sets[name]["coefficients"])(drift))
        now = view(family=family, signal=Signal(changes=(drift,)))
        assert TeaCache(value * 1.01).skip(now) and not TeaCache(value * 0.99).skip(now) and TeaCache().refuses(family, 20, "euler") == ""
    assert "nothing was published for family aura" in TeaCache().refuses("aura", 20, "euler")
    assert "wan2.1_t2v_14B_ret_mode" in TeaCache().refuses("wan", 20, "euler"), "which of them cannot be told from the family"
    assert TeaCache(coefficients="wan2.1_t2v_14B").refuses("wan", 20, "euler") == ""


def test_teacache_at_zero_skips_nothing_even_where_a_polynomial_falls_below_zero():
    for name in COEFFICIENTS.sets:
        for drift in (0.0, 0.05, 0.1, 0.2, 0.4):
            assert not TeaCache(0.0, name).skip(view(signal=Signal(changes=(drift,))))
    assert np.poly1d(COEFFICIENTS.sets["wan2.1_t2v_14B"]["coefficients"])(0.05) < 0, "else this proves nothing"


def easycache_loop(threshold, warm_up, inputs, outputs, forced):
    """The published loop: previous input and output, and the rate, live on from call to call."""
    k = previous_input = previous_output = input_at_computed = None
    accumulated, decisions = 0.0, []
    for n, (x, v) in enumerate(zip(inputs, outputs, strict=True)):
        if n < warm_up or n == len(inputs) - 1 or n in forced or k is None:
            compute, accumulated = True, 0.0
        else:
            accumulated += k * np.abs(x - previous_input).mean() / np.abs(previous_output).mean()
            compute = not accumulated < threshold
            if compute:
                accumulated = 0.0
        previous_input = x
        if compute:
            if previous_output is not None:
                k = np.abs(v - previous_output).mean() / np.abs(x - input_at_computed).mean()
            previous_output, input_at_computed = v, x
        decisions.append(compute)
    return decisions


@pytest.mark.parametrize("seed", range(8))
def test_easycache_decides_as_the_published_loop_does(seed):
    make = np.random.default_rng(seed)
    inputs, outputs = (np.cumsum(make.normal(size=(50, 40)) * make.uniform(0.1, 1, (50, 1)), 0) + 5 for _ in range(2))
    forced = {int(n) for n in make.integers(0, 50, 4)}

    def told(n, computed):
        last = computed[-1]
        rate = None
        if len(computed) > 1:
            earlier = computed[-2]
            rate = np.abs(outputs[last] - outputs[earlier]).mean() / np.abs(inputs[last] - inputs[earlier]).mean()
        travel = sum(np.abs(inputs[m] - inputs[m - 1]).mean() for m in range(last + 1, n + 1))
        return Signal(flow=Flow(np.abs(inputs[n]).mean(), travel, np.abs(outputs[last]).mean(), rate))

    counts = set()
    for threshold in (0.05, 0.3, 0.8):
        wanted = easycache_loop(threshold, 5, inputs, outputs, forced)
        assert walk(EasyCache(threshold, 5), steps_of(50), told, forced) == wanted
        counts.add(sum(wanted))
    assert len(counts) > 1 and min(counts) < 40


def stretched(curve, steps):
    """Nearest entry, as published."""
    scale = (len(curve) - 1) / (steps - 1)
    return np.asarray(curve)[np.round(np.arange(steps) * scale).astype(int)]


def magcache_loop(threshold, retention, most, curves, always, steps, forced):
    """The published loop, once per condition; an evaluation is skipped when all of them skip."""
    states = [[1.0, 0.0, 0] for _ in curves]
    decisions = []
    for n in range(steps):
        skips = []
        for state, curve in zip(states, curves, strict=True):
            skip = False
            if n >= int(steps * retention) and n > 0:
                state[0] *= curve[n]
                state[1] += abs(1 - state[0])
                state[2] += 1
                skip = state[1] < threshold and state[2] <= most
            skips.append(skip and n != steps - 1 and n not in forced and n not in always)
        if not all(skips):
            states = [[1.0, 0.0, 0] for _ in curves]
        decisions.append(not all(skips))
    return decisions


@pytest.mark.parametrize("name", CURVES.sets)
def test_magcache_decides_as_the_published_loop_does(name):
    told, counts = CURVES.sets[name], set()
    for seed, steps in enumerate((20, 28, 33, 50)):
        chance = random.Random(seed)
        forced = {n for n in range(steps) if chance.random() < 0.1}
        curves = [stretched(ratios, steps) for ratios in told["ratios"]]
        always = {n for n in range(steps) if round(n * (told["steps"] - 1) / (steps - 1)) in told.get("always_computed", ())}
        for threshold, retention, most in ((0.06, 0.2, 2), (0.24, 0.1, 5), (0.02, 0.25, 3)):
            wanted = magcache_loop(threshold, retention, most, curves, always, steps, forced)
            assert walk(MagCache(threshold, retention, most, name), steps_of(steps), forced=forced) == wanted
            counts.add(sum(wanted) / steps)
    assert len(counts) > 2 and min(counts) < 0.7


def test_magcache_curves_are_whole_and_a_curve_of_their_own_length_is_taken_as_it_is():
    for name, told in CURVES.sets.items():
        assert {len(ratios) for ratios in told["ratios"]} == {told["steps"]} and len(told["ratios"]) in (1, 2), name
        assert all(ratios[0] == 1.0 and all(0.3 < ratio < 2 for ratio in ratios) for ratios in told["ratios"]), name
        assert [nearest(n, told["steps"], told["steps"]) for n in range(told["steps"])] == list(range(told["steps"]))
    assert "wan2.2_t2v_14B_low_noise" in MagCache().refuses("wan", 20, "euler") and MagCache().refuses("flux", 20, "euler") == ""


@pytest.mark.parametrize("published", [COEFFICIENTS, CURVES], ids=["TeaCache", "MagCache"])
def test_published_constants_name_model_and_source_and_a_family_has_one_default_at_most(published):
    for name, told in published.sets.items():
        assert told["model"] and told["family"] and "/" in told["source"] and "Apache-2.0" in told["source"], name
    for family in {told["family"] for told in published.sets.values()}:
        assert sum(bool(told.get("default")) for told in published.of(family).values()) <= 1
    assert all(len(told["coefficients"]) == 5 for told in COEFFICIENTS.sets.values())


def test_a_curve_that_jumps_in_the_positive_condition_alone_is_computed(monkeypatch):
    curves = [[1.0] * 20, [1.0] * 10 + [2.0] * 10]
    for ratios in (curves, curves[::-1]):
        monkeypatch.setitem(CURVES.sets, "flux", {"family": "flux", "default": True, "steps": 20, "ratios": ratios})
        decisions = walk(MagCache(0.5, 0.2, 3), STEPS)
        assert not all(decisions[4:10]) and all(decisions[10:])


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


def test_reasons_to_stand_down():
    assert stand_down(FEWEST_STEPS, {"reprise.step_cache", "someone"}, {"patches"}) == ""
    assert "8 step" in stand_down(FEWEST_STEPS - 1, set(), set())
    assert "nunchaku" in stand_down(20, set(), set(), "ComfyFluxWrapper")
    assert "EasyCache" in stand_down(20, {"easycache"}, set()) and "LazyCache" in stand_down(20, {"lazycache"}, set())
    assert "TeaCache" in stand_down(20, set(), {"rel_l1_thresh"}) and "MagCache" in stand_down(20, set(), {"magcache_thresh"})
