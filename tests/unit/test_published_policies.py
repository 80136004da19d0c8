"""TeaCache, EasyCache and MagCache decide as the published loops do, with the published constants."""
import random

import numpy as np
import pytest
from views import STEPS, Signal, steps_of, view, walk

from pack.core.stepcache.policies.easycache import EasyCache
from pack.core.stepcache.policies.magcache import CURVES, MagCache, nearest
from pack.core.stepcache.policies.teacache import COEFFICIENTS, TeaCache
from pack.core.stepcache.signal import Flow


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
    assert TeaCache().refuses("aura", 20, "euler") == (
        "models of family aura have no published coefficients (name the coefficients of another model, or choose another policy)")
    assert MagCache().refuses("", 20, "euler").startswith("models of no known family have no published curve (name the curve of another model")
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
