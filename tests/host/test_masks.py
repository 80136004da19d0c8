"""Denoise masks: nothing is predicted across one that changes, and one that stays costs nothing."""
from dataclasses import dataclass

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from harness import (
    CONCRETE,
    EVERYTHING,
    QUICK,
    STEPS,
    attached,
    decisions,
    model,
    relative,
    run,
    sample,
    whys,
)

from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.signal import MODEL_INPUT
from testbed import tiny

HERE = pytest.mark.parametrize("level", CONCRETE)
EACH = pytest.mark.parametrize("name", QUICK[:2])      # pictures


def staircase(levels: int) -> torch.Tensor:
    """A mask of so many heights, from 1 down to 1 / levels."""
    return (1 - torch.arange(8).div(8 / levels).floor() / levels).repeat(1, 1, 8, 1)


@HERE
@EACH
def test_where_the_denoise_mask_changes_nothing_is_predicted_across(name, level):
    """Differential diffusion lets more and more of the picture go as sigma falls."""
    masked = DifferentialDiffusion.execute(model(name)).result[0]
    sampling = {"steps": 24, "noise_mask": staircase(4)}
    masks: list = []
    function = masked.model_options["denoise_mask_function"]

    def told(*args, **kwargs):
        masks.append(function(*args, **kwargs))
        return masks[-1]

    watched = masked.clone()
    watched.set_model_denoise_mask_function(told)
    latent, report = run(watched, name, cached={"policy": EVERYTHING, "level": level}, **sampling)
    changes = [n for n in range(1, 24) if not torch.equal(masks[n], masks[n - 1])]
    assert len(masks) == 24 and len(changes) == 3
    assert [n for n, why in enumerate(whys(report)) if why == "the denoise mask changes"] == changes
    assert all(decisions(report)[n] for n in changes) and decisions(report).count(False) >= 8
    assert "mask changed 3 times" in report.reason and torch.isfinite(latent).all()
    host = sample(masked, name, **sampling)
    assert 0 < relative(latent, host) < 0.3


def test_a_mask_that_moves_by_one_pixel_is_another():
    """Two masks with the same sum, and one that is written into."""
    shared, n = torch.zeros(1, 16, 8, 8), [0]
    shared[..., :4] = 1

    def moving(sigma, denoise_mask, extra_options):
        n[0] += 1
        if n[0] in (4, 8):
            shared.copy_(shared.roll(1, -1))
        return shared

    patched = model("flux").clone()
    patched.set_model_denoise_mask_function(moving)
    _, report = run(patched, "flux", cached={"policy": EVERYTHING}, noise_mask=torch.ones(1, 1, 8, 8))
    assert [n for n, why in enumerate(whys(report)) if "mask" in why] == [3, 7]


def test_a_mask_function_is_called_as_often_as_without_and_is_back_in_its_place():
    calls = []

    def function(sigma, denoise_mask, extra_options):
        calls.append(float(sigma[0]))
        return denoise_mask

    left: list = []

    def outermost(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        left.append(executor.class_obj.model_options["denoise_mask_function"])
        return result

    patched = model("flux").clone()
    patched.set_model_denoise_mask_function(function)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test.look", outermost)
    sample(patched, "flux", noise_mask=staircase(2))
    alone, calls[:] = list(calls), []
    cached = attached(patched)
    sample(cached, "flux", noise_mask=staircase(2))
    assert calls == alone and left == [function, function]


def test_a_mask_that_stays_costs_no_skip():
    masked = DifferentialDiffusion.execute(model("flux")).result[0]
    _, report = run(masked, "flux", cached={"policy": EVERYTHING}, noise_mask=torch.ones(1, 1, 8, 8))
    _, bare = run(model("flux"), "flux", cached={"policy": EVERYTHING})
    assert decisions(report) == decisions(bare) and report.reason == ""
    assert report.cache_bytes - bare.cache_bytes == 4 * 16 * 8 * 8, "the mask outlives an evaluation, so it is counted"


@pytest.mark.parametrize("policy", ["interval", "error control", "first block"])
@HERE
@EACH
def test_inpainting_keeps_what_lies_outside_the_mask(name, level, policy):
    """The host rewrites x on every step under a mask."""
    if policy == "first block" and not LEVELS[level].gates:
        pytest.skip("this policy needs blocks")
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6] = 1
    picture = tiny.noise(name, seed=21)
    knobs = {"interval": {}, "error control": {"tolerance": 0.3}, "first block": {"threshold": 0.5}}[policy]
    host = sample(model(name), name, noise_mask=mask, latent=picture)
    latent, report = run(model(name), name, cached={"policy": policy, "policy_knobs": knobs, "level": level}, noise_mask=mask, latent=picture)
    outside = (mask == 0).expand_as(latent)
    assert torch.equal(latent[outside], host[outside]) and 0 < relative(latent, host) < 0.2
    assert not all(decisions(report))


@dataclass(frozen=True)
class Foresees:
    """A test policy: notes what its signal expects of the output, and computes."""

    told: list
    name = "foresees"
    needs_forward = False
    signal = MODEL_INPUT

    def skip(self, view):
        flow = view.signal.flow
        self.told.append(flow and flow.rate and flow.rate * flow.travel / flow.output_norm)
        return False


@pytest.mark.parametrize("loud", [1.0, 30.0], ids=["a picture", "a loud picture"])
@EACH
def test_under_a_mask_a_gate_on_the_input_foresees_the_output_however_much_the_host_rewrites(name, loud, monkeypatch):
    """The host puts the noised picture outside the mask into x on every step; only what the model makes of it counts."""
    told, outputs, learn = [], [], StepCache.learn
    monkeypatch.setattr(StepCache, "learn", lambda self, row, value: outputs.append(value.clone()) or learn(self, row, value))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6] = 1
    run(model(name), name, cached={"policy": Foresees(told), "level": "guided output"}, noise_mask=mask, latent=loud * tiny.noise(name, seed=21))
    actual = [relative(now, before) for before, now in zip(outputs, outputs[1:], strict=False)]
    foreseen = told[1:]     # the first computed step has none before it
    assert len(foreseen) == STEPS - 3 and all(0.5 < expected / happened < 1.8 for expected, happened in zip(foreseen, actual[1:], strict=False))
