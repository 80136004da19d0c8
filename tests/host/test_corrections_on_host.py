"""Corrections in runs of the host: they act on what is skipped and on nothing else."""
import pytest
import torch
from harness import CONCRETE, QUICK, Never, decisions, model, plain, relative, run

from pack.core.stepcache.corrections import CORRECTIONS

ACTIVE = [name for name, entry in CORRECTIONS.items() if entry().start() is not None]


def corrected(name, correction, cfg=3.0, **cached):
    return run(model(name), name, cfg=cfg, cached={"correction": CORRECTIONS[correction](), **cached})


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", QUICK)
def test_every_correction_works_at_every_level_and_stays_near(name, correction, level):
    latent, report = corrected(name, correction, level=level, predictor="automatic")
    assert not all(decisions(report)) and report.settings["correction"]["name"] == correction
    assert 0 < relative(latent, plain(name)) < 0.2


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", QUICK)
def test_computed_steps_are_bit_identical_to_the_host_s(name, correction, level):
    latent, report = corrected(name, correction, level=level, policy=Never(), predictor="automatic")
    assert all(decisions(report)) and torch.equal(latent, plain(name))


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("correction", ACTIVE)
@pytest.mark.parametrize("name", QUICK)
def test_a_correction_changes_what_stands_in_and_is_counted(name, correction, level):
    latent, report = corrected(name, correction, level=level)
    without, bare = corrected(name, "none", level=level)
    assert decisions(report) == decisions(bare) and not torch.equal(latent, without)
    assert report.cache_bytes > bare.cache_bytes


@pytest.mark.parametrize("correction", ACTIVE)
def test_runs_of_one_model_do_not_learn_from_each_other(correction):
    first, _ = corrected("flux", correction)
    corrected("flux", correction, cfg=1.0)
    again, _ = corrected("flux", correction)
    assert torch.equal(first, again)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("correction", ACTIVE)
def test_samplers_that_evaluate_twice_or_add_noise_are_served(correction, sampler):
    latent, report = run(model("flux"), "flux", sampler=sampler, cached={"correction": CORRECTIONS[correction](), "predictor": "automatic"})
    assert torch.isfinite(latent).all() and not all(decisions(report))
