"""Every run begins anew, whatever became of the one before."""
from dataclasses import replace

import comfy.model_management
import comfy.sample
import pytest
import torch
from harness import CONCRETE, QUICK, STEPS, attached, blocks, decisions, model, run, sample, sample_by

from pack.core.stepcache.policies import POLICIES
from testbed import tiny


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_runs_of_one_model_do_not_know_of_each_other(name, level):
    fresh = [{}, {"size": (8, 12)}, {"steps": 15}, {"batch": 2}, {"cfg": 1.0}, {}]
    wanted = [run(model(name), name, cached={"level": level, "predictor": "automatic"}, **sampling) for sampling in fresh]
    reports: list = []
    patched = attached(model(name), level=level, predictor="automatic", reports=reports)
    for (latent, report), sampling in zip(wanted, fresh, strict=True):
        assert torch.equal(sample(patched, name, **sampling), latent)
        assert decisions(reports[-1]) == decisions(report) and reports[-1].evaluations == report.evaluations
        assert decisions(report).count(False) >= 3
    assert len(reports) == len(fresh)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_remembers_a_run(policy):
    """The same patched model again, as when the host serves the node from its cache: after a longer run and one of another size."""
    reports: list = []
    patched = attached(model("flux"), policy=policy, predictor="automatic", reports=reports)
    first = sample(patched, "flux", steps=20)
    for between in ({"steps": 25}, {"size": (8, 12), "steps": 20}):
        sample(patched, "flux", **between)
    assert torch.equal(sample(patched, "flux", steps=20), first)
    one, *_, other = ([replace(e, ms=0.0) for e in report.each] for report in reports)
    assert one == other and reports[0].reason == reports[-1].reason and reports[0].cache_bytes == reports[-1].cache_bytes


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
@pytest.mark.parametrize("place", [0, 1, -1], ids=["first block", "second block", "last block"])
@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_an_interrupted_run_leaves_nothing_to_the_next(name, level, place, error):
    wanted, _ = run(model(name), name, cached={"level": level})
    reports: list = []
    patched, block = attached(model(name), level=level, reports=reports), blocks(name)[place]
    before, calls = [dict(vars(b)) for b in blocks(name)], []

    def stop(*_):
        calls.append(1)
        if len(calls) == 5:
            raise error("stop here")

    hook = next(m for m in block.modules() if not list(m.children()) and list(m.parameters())).register_forward_pre_hook(stop)
    try:
        with pytest.raises(error):
            sample(patched, name)
    finally:
        hook.remove()
    assert [dict(vars(b)) for b in blocks(name)] == before
    assert len(reports) == 1 and len(reports[0].each) < STEPS
    assert torch.equal(sample(patched, name), wanted)
    assert len(reports[1].each) == STEPS


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_two_halves_of_a_schedule_are_two_runs_each_with_its_own_first_and_last_step(name, level):
    reports: list = []
    patched = attached(model(name), level=level, policy_knobs={"warm_up": 1}, reports=reports)
    first = sample(patched, name, steps=24, last_step=12, force_full_denoise=False)
    noise = torch.zeros_like(tiny.noise(name))
    with torch.inference_mode():
        second = comfy.sample.sample(
            patched, noise, 24, 3.0, "euler", "simple", tiny.conditioning(name, 11), tiny.conditioning(name, 12), first,
            disable_noise=True, start_step=12, disable_pbar=True, seed=1)
    assert torch.isfinite(second).all() and len(reports) == 2
    for report in reports:
        assert report.steps == 12 and decisions(report)[0] and decisions(report)[-1] and decisions(report).count(False) >= 4


@pytest.mark.parametrize("name", QUICK)
def test_a_shape_that_changes_in_mid_run_is_computed(name):
    reports: list = []
    patched = attached(model(name), level="guided output", policy_knobs={"interval": 4, "warm_up": 1}, reports=reports)

    def grows(denoise, x, sigmas):
        for n, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            if n == 6:
                x = torch.cat([x, x], -1)
            x = x + (x - denoise(x, now)) / now * (following - now)
        return x

    latent = sample_by(grows, patched, name)
    assert latent.shape[-1] == 16 and torch.isfinite(latent).all()
    assert decisions(reports[0])[6], "its history has another shape"
