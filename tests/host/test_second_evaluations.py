"""Heun's second evaluations on trained models: what is told of them is no less than what they come to.

They are not measured by any later step, so the numbers that foresee them are held here by whole runs.
"""
import comfy.sample
import pytest
import torch
from harness import At

from benchmarks import _subjects
from pack.core.attach import attach_step_cache
from pack.core.report import Report
from pack.core.run import Settings
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS

STEPS = 9
SECONDS = (4, 8, 12)        # evaluations, early, in the middle and late


@pytest.fixture(scope="module", params=["flux", "zimage"])
def subject(request):
    trained = _subjects.SUBJECTS[request.param]
    pictures = trained.pictures(_subjects.SCORE, 8)
    return trained.load(), [pictures.one(n) for n in (0, 5)]


def sampled(patcher, picture, policy, cfg: float) -> tuple[torch.Tensor, Report | None]:
    reports: list[Report] = []
    if policy is not None:
        patcher = attach_step_cache(patcher, Settings(policy, PREDICTORS["automatic"](), LEVELS["guided output"]()), reports.append)
    with torch.inference_mode():
        latent = comfy.sample.sample(
            patcher, picture.noise, STEPS, cfg, "heun", "simple", *picture.conds, picture.noise * 0, seed=1, disable_pbar=True)
    return latent, reports[0] if reports else None


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_one_that_is_skipped_comes_to_no_more_than_is_told(subject, cfg):
    patcher, pictures = subject
    shares = []
    for picture in pictures:
        full, _ = sampled(patcher, picture, None, cfg)
        for at in SECONDS:
            latent, report = sampled(patcher, picture, At((at,)), cfg)
            assert [n for n, e in enumerate(report.each) if not e.computed] == [at]
            shares.append(((latent - full).norm() / full.norm()).item() / report.estimated_error)
    assert max(shares) < 1 and max(shares) > 0.1, shares


def test_before_any_was_measured_one_is_expected_to_be_no_nearer_than_it_turns_out(subject):
    patcher, pictures = subject
    for picture in pictures:
        _, report = sampled(patcher, picture, POLICIES["error control"](tolerance=0.0), 1.0)
        shares = [e.hindcast_error / e.predicted_error for e in report.each[4::2]]
        assert len(shares) > 5 and max(shares) < 1 and min(shares) > 0.2, shares
