"""Samplers: every one gets a finite picture, and an honest report."""
import math

import comfy.samplers
import pytest
import torch
from harness import CONCRETE, ONE_PHASE, QUICK, STEPS, At, assert_moves, decisions, model, plain, relative, run, sample, schedule

from pack.core.run import Settings
from pack.core.stepcache.governor import DETERMINISTIC, STATEFUL_SAMPLERS
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.stepcache.predictors.divided_differences import COORDINATES

SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral", "uni_pc"]
EVERYTHING = At(tuple(range(1000)))
STEADY = ["euler", "dpmpp_2m", "heun", "uni_pc"]


def longest_skip(report) -> int:
    return max(len(part) for part in "".join(".s"[not computed] for computed in decisions(report)).split("."))


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", QUICK)
def test_every_sampler_gets_a_picture_near_the_hosts(name, sampler, level):
    cached = {"level": level, "predictor": "automatic", "policy_knobs": {"interval": 3}}
    latent, report = run(model(name), name, sampler=sampler, cached=cached)
    host = assert_moves(name, model(name), sampler=sampler)
    assert torch.isfinite(latent).all() and not torch.equal(latent, host)
    assert relative(latent, host) < 0.2
    assert report.state == "ran" and report.steps == STEPS and len(report.each) >= STEPS
    assert 0 < report.evaluations < len(report.each) and decisions(report)[0] and decisions(report)[-1]
    assert all(math.isfinite(number) for e in report.each for number in (e.sigma, e.share, e.predicted_error or 0, e.hindcast_error or 0))
    if sampler in STEADY:
        assert report.reason == "" and longest_skip(report) >= 2
    else:
        assert "noise" in report.reason and longest_skip(report) == 1


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_of_the_host_is_served_and_those_that_are_not_known_as_steady_skip_once_at_most(sampler):
    if sampler in STATEFUL_SAMPLERS:
        pytest.skip("is left alone")
    cached = {"policy": EVERYTHING, "predictor": "automatic"}
    latent, report = run(model("flux"), "flux", sampler=sampler, cfg=1.5, cached=cached)
    assert torch.isfinite(latent).all() and report.state == "ran" and not all(decisions(report)) and decisions(report)[0]
    known = report.sampler in DETERMINISTIC
    assert longest_skip(report) in ((2, 3, 4) if known else (1,)) and ("at most one skip" in report.reason) != known
    assert latent.norm() < 2 * sample(model("flux"), "flux", sampler=sampler, cfg=1.5).norm(), "nothing builds up"


def test_the_names_of_steady_samplers_are_the_hosts():
    functions = {comfy.samplers.ksampler(name).sampler_function.__name__.removeprefix("sample_") for name in comfy.samplers.KSAMPLER_NAMES}
    functions |= {comfy.samplers.sampler_object(name).sampler_function.__name__.removeprefix("sample_") for name in ("ddim", "uni_pc", "uni_pc_bh2")}
    assert DETERMINISTIC - {"ddim"} <= functions, sorted(DETERMINISTIC - functions)


def fits(policy: str, level: str) -> bool:
    """Whether the level lets the policy see what it looks at."""
    try:
        Settings(POLICIES[policy](), PREDICTORS["hold"](), LEVELS[level]())
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("policy", "level"), [(policy, level) for policy in POLICIES for level in LEVELS if fits(policy, level)])
def test_every_policy_works_at_every_level_that_it_can(policy, level):
    latent, report = run(model("flux"), "flux", steps=20, cached={"policy": policy, "level": level})
    assert report.state == "ran" and report.policy == policy
    if "so everything is computed" in report.reason:
        assert all(decisions(report)) and torch.equal(latent, plain("flux", steps=20))
    else:
        assert relative(latent, plain("flux", steps=20)) < 0.2
    if policy in ("error control", "interval", "first block", "TeaCache", "MagCache", "CG-Taylor", "ZEUS", "schedule"):
        assert not all(decisions(report)), "the defaults skip something"


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_every_predictor_works_at_every_level(name, predictor, level):
    latent, report = run(model(name), name, cached={"predictor": predictor, "level": level, "level_knobs": ONE_PHASE.get(level)})
    assert report.state == "ran" and report.predictor == predictor and decisions(report).count(False) >= 4
    assert 0 < relative(latent, plain(name)) < 0.2


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("tolerance", [0.003, 0.01, 0.1])
@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_error_control_keeps_the_picture_within_its_tolerance_and_tells_no_less_than_it_is_off(name, level, tolerance, cfg):
    """In the unit that is promised, relative L2; these models come to 0.03 to 1.04 tolerances."""
    cached = {"policy": "error control", "policy_knobs": {"tolerance": tolerance}, "predictor": "automatic", "level": level}
    latent, report = run(model(name), name, steps=20, cfg=cfg, cached=cached)
    full = plain(name, steps=20, cfg=cfg)
    error = ((latent - full).norm() / full.norm()).item()
    assert error < 1.2 * tolerance and error < 1.2 * report.estimated_error and report.estimated_error < 1.2 * tolerance
    assert report.evaluations < 20
    owed, skips = 0.0, 0
    for evaluation in report.each:
        owed, skips = (0.0, 0) if evaluation.computed else (owed + evaluation.predicted_error, skips + 1)
        assert owed <= tolerance * math.sqrt((skips + 1) / 20) + 1e-9, "each group of skips stays within its share"


def test_a_larger_tolerance_never_computes_more():
    cached = lambda tolerance: {"policy": "error control", "policy_knobs": {"tolerance": tolerance}, "predictor": "automatic"}
    computed = [run(model("flux"), "flux", steps=20, cached=cached(tolerance))[1].evaluations for tolerance in (0.0, 0.01, 0.03, 0.1, 0.5)]
    assert computed == sorted(computed, reverse=True) and computed[0] == 20


SCHEDULES = ["simple", "karras", "exponential", "beta", "sgm_uniform", "normal", "linear_quadratic", "kl_optimal"]


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_every_schedule_works_with_every_coordinate(scheduler, coordinate):
    cached = {"predictor": "divided differences", "predictor_knobs": {"order": 2, "coordinate": coordinate}, "policy_knobs": {"interval": 2}}
    latent, report = run(model("flux"), "flux", steps=40, scheduler=scheduler, cached=cached)
    assert torch.isfinite(latent).all() and report.state == "ran"


def test_an_interval_of_one_computes_every_evaluation_of_a_sampler_with_two_per_step():
    latent, report = run(model("flux"), "flux", sampler="heun", cached={"policy_knobs": {"interval": 1}})
    assert all(decisions(report))
    assert torch.equal(latent, plain("flux", sampler="heun"))


@pytest.mark.parametrize("sampler", [name for name in comfy.samplers.KSAMPLER_NAMES if name.endswith("cfg_pp")])
def test_a_sampler_that_reads_the_unguided_output_is_served_below_guidance(sampler):
    """CFG++ takes the negative's output from a function behind guidance: a step skipped above it would hand it an old one."""
    latent, report = run(model("flux"), "flux", sampler=sampler, cfg=1.5, cached={"level": "guided output", "policy_knobs": {"interval": 2}})
    assert report.level == "model output" and "looks into guidance" in report.reason and not all(decisions(report))
    replayed, _ = run(model("flux"), "flux", sampler=sampler, cfg=1.5, cached={"level": "model output", "policy_knobs": {"interval": 2}})
    assert torch.equal(latent, replayed)


@pytest.mark.parametrize("sampler", [name for name in STATEFUL_SAMPLERS if name != "ar_video"])     # which needs a model of its own
def test_a_sampler_with_which_none_may_be_skipped_runs_untouched_and_is_told(sampler):
    latent, report = run(model("flux"), "flux", sampler=sampler, cfg=1.5, cached={"policy": EVERYTHING, "predictor": "automatic"})
    assert torch.equal(latent, sample(model("flux"), "flux", sampler=sampler, cfg=1.5))
    assert report.state == "off" and f"sampler {sampler} {STATEFUL_SAMPLERS[sampler]}" in report.reason


@pytest.mark.parametrize("level", ["guided output", "model output", "block range"])
@pytest.mark.parametrize("name", QUICK)
def test_the_last_step_before_sigma_rises_is_computed_and_nothing_is_looked_back_on_in_such_a_run(name, level):
    sigmas = torch.cat([schedule(name)[:8], schedule(name)[4:]])
    latent, report = run(model(name), name, sigmas=sigmas, cached={"policy": EVERYTHING, "level": level, "max_consecutive_skips": 50})
    assert decisions(report)[7] and report.each[7].why == "sigma rises next" and decisions(report)[8] and not all(decisions(report)[9:])
    if level == "guided output":
        without, _ = run(model(name), name, sigmas=sigmas, cached={"policy": EVERYTHING, "level": level, "max_consecutive_skips": 50,
                                                                   "level_knobs": {"look_back": False}})
        assert torch.equal(latent, without)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("rises", [1, 2])
@pytest.mark.parametrize("name", QUICK)
def test_error_control_skips_nothing_before_the_last_rise_of_sigma_and_goes_on_after_it(name, rises, sampler):
    """What an error comes to over a rise nobody measures."""
    parts = [schedule(name)[:9], schedule(name)[5:10], schedule(name)[6:-1]][:rises] + [schedule(name, 20)[8:]]
    sigmas = torch.cat(parts)
    before = sum(len(part) for part in parts[:-1]) * (2 if sampler == "heun" else 1)
    cached = {"policy": "error control", "policy_knobs": {"tolerance": 0.3}, "predictor": "automatic"}
    _, report = run(model(name), name, sigmas=sigmas, sampler=sampler, cfg=1.0, cached=cached)
    assert all(decisions(report)[:before]) and not all(decisions(report)[before:])
    assert all(e.predicted_error is None for e in report.each[:before]) and report.estimated_error > 0
    assert "error control computes everything before the last rise" in report.reason and report.reason in report.line()
    _, other = run(model(name), name, sigmas=sigmas, sampler=sampler, cfg=1.0, cached={"policy": At((6,)), "predictor": "automatic"})
    assert other.estimated_error is None and "no error is told of such skips" in other.reason


@pytest.mark.parametrize("name", QUICK)
def test_a_last_step_with_nothing_left_to_do_does_not_stand_for_the_last_one(name):
    """As kl_optimal's: the one before it makes the picture."""
    sigmas = torch.cat([schedule(name)[:-1], torch.tensor([4e-5, 0.0])])
    _, report = run(model(name), name, sigmas=sigmas, cached={"policy": EVERYTHING, "max_consecutive_skips": 50})
    assert [e.why for e in report.each[-2:]] == ["last steps", "last step"] and decisions(report)[-2:] == [True, True] and not any(decisions(report)[2:-2])
