"""The numbers, against a sampler with a cache written a second time, in a few lines and in other ways."""
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from harness import (
    CONCRETE,
    EVERY_SECOND,
    NAMES,
    QUICK,
    attached,
    blocks,
    decisions,
    model,
    plain,
    relative,
    replay_errors,
    run,
    sample,
    sample_by,
)

from testbed import tiny

COORDINATES = {
    "step index": lambda n, sigma: n,
    "log-SNR": lambda n, sigma: math.log((1 - min(sigma, 0.999)) / min(sigma, 0.999)),
    "sigma": lambda n, sigma: sigma,
}


def cached_euler(order: int, coordinate: str, interval: int, warm_up: int, skipped: list):
    """Euler whose derivative is, on a skipped step, that of the polynomial of `order` through the last computed ones."""
    def sampler(denoise, x, sigmas):
        at, kept = COORDINATES[coordinate], []                    # kept: (n, coordinate, derivative)
        for n, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            last = n == len(sigmas) - 2
            if n >= warm_up and not last and len(kept) > order and n - kept[-1][0] < interval:
                points = kept[-order - 1:]
                t = np.array([point[1] for point in points], dtype=np.float64)
                flat = np.stack([point[2].numpy().ravel() for point in points]).astype(np.float64)
                coefficients = np.linalg.solve(np.vander(t - t[-1], increasing=True), flat)
                value = (np.vander([at(n, now) - t[-1]], order + 1, increasing=True) @ coefficients)[0]
                d = torch.from_numpy(value).float().view_as(x)
                skipped.append(n)
            else:
                d = (x - denoise(x, now)) / now
                kept.append((n, at(n, now), d.clone()))
            x = x + (following - now) * d
        return x
    return sampler


@pytest.mark.parametrize("level", ["guided output", "model output"])
@pytest.mark.parametrize(("order", "coordinate"), [(0, "step index"), *itertools.product((1, 2, 3), COORDINATES)])
@pytest.mark.parametrize("name", QUICK)
def test_latents_equal_those_of_an_independent_cache(name, order, coordinate, level):
    skipped: list = []
    wanted = sample_by(cached_euler(order, coordinate, 3, 2, skipped), model(name), name)
    predictor = {"predictor": "hold"} if order == 0 else {
        "predictor": "divided differences", "predictor_knobs": {"order": order, "coordinate": coordinate}}
    latent, report = run(model(name), name, cached={
        "policy_knobs": {"interval": 3, "warm_up": 2}, "level": level, "level_knobs": {"look_back": False} if level == "guided output" else {}, **predictor})
    assert [n for n, computed in enumerate(decisions(report)) if not computed] == skipped and len(skipped) >= 4
    assert relative(latent, wanted) < 1e-5
    assert relative(latent, plain(name)) > 1e-4, "too near to the host's latent to tell a right prediction from a wrong one"


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", NAMES)
def test_a_skip_with_the_same_input_repeats_the_computed_result(name, level):
    reports: list = []
    errors = replay_errors(attached(model(name), policy=EVERY_SECOND, level=level, reports=reports), name)
    assert decisions(reports[0]) == [True, False] * 11 + [True, True]       # the last place is always computed
    assert max(errors) < 1e-6


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("name", QUICK)
def test_a_block_range_skip_repeats_the_computed_result_wherever_the_range_begins(name, first):
    patched = attached(model(name), policy=EVERY_SECOND, level="block range", level_knobs={"first_blocks": first})
    assert max(replay_errors(patched, name)) < 1e-6


@pytest.mark.parametrize("name", QUICK)
def test_block_range_sees_the_present_step_where_the_other_levels_only_extrapolate(name):
    ranged, _ = run(model(name), name, cached={"level": "block range"})
    held, _ = run(model(name), name, cached={"level": "model output"})
    assert relative(ranged, held) > 1e-4
    assert relative(ranged, plain(name)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_models_in_other_types_are_off_bit_for_bit_and_repeat_what_they_computed(name, level, dtype):
    patcher = tiny.patcher(name, dtype=dtype)
    assert patcher.model.get_dtype() == dtype
    off, _ = run(patcher, name, cached={"policy_knobs": {"interval": 1}, "level": level})
    assert torch.equal(off, sample(patcher, name))
    assert max(replay_errors(attached(patcher, policy=EVERY_SECOND, level=level), name)) < 0.05 * torch.finfo(dtype).eps ** 0.5


@dataclass(frozen=True)
class Gate:
    """A test policy that remembers what it was shown, and skips every second evaluation from the fourth on."""

    name = "gate"
    needs_forward = True
    signal = "first block"
    shown: list = field(default_factory=list, compare=False)

    def skip(self, view):
        self.shown.append((view.step.evaluation, view.signal.drift))
        return view.step.evaluation >= 4 and view.step.evaluation % 2 == 0


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("name", QUICK)
def test_the_gate_sees_how_far_the_first_blocks_moved_since_the_last_computed_step(name, first):
    seen, gate = {"in": [], "out": []}, Gate()

    def stream(value):
        value = value[0] if isinstance(value, tuple) else value
        return value.clone()

    before = blocks(name)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen["in"].append(stream(kwargs["img"] if "img" in kwargs else args[0])), with_kwargs=True)
    after = blocks(name)[first - 1].register_forward_hook(lambda module, args, out: seen["out"].append(stream(out)))
    try:
        _, report = run(model(name), name, cfg=1.0, cached={"policy": gate, "level": "block range", "level_knobs": {"first_blocks": first}})
    finally:
        before.remove()
        after.remove()
    residuals = [out[:, -into.shape[1]:] - into for into, out in zip(seen["in"], seen["out"], strict=True)]
    drifts = dict(gate.shown)
    assert len(drifts) == len(gate.shown), "it is asked once per evaluation"
    for n, drift in drifts.items():
        last = max(m for m in range(n) if decisions(report)[m])
        assert drift == pytest.approx(((residuals[n] - residuals[last]).abs().mean() / residuals[last].abs().mean()).item(), rel=1e-4)
    assert set(drifts) >= set(range(1, 11))
