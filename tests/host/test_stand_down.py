"""When the step cache must not act, sampling runs as without it, and it says why."""
import math

import comfy.k_diffusion.sampling
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from harness import CONCRETE, OF_BLOCKS, QUICK, Never, attached, decisions, model, network, plain, run, sample, schedule

from pack.core.stepcache.governor import SKIPPER_MODELS, SKIPPER_OPTIONS, SKIPPER_WRAPPERS, stand_down
from testbed import tiny

PASS = lambda executor, *args, **kwargs: executor(*args, **kwargs)


def named(patched, kind: str):
    """The diffusion model as one of another class, which another pack's loader leaves there."""
    network(patched).__class__ = type(kind, (type(network(patched)),), {})


SIGNS = {f"{name}: wrapper {key}": lambda patched, key=key: patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, PASS)
         for key, name in SKIPPER_WRAPPERS.items()}
SIGNS |= {f"{name}: option {key}": lambda patched, key=key: patched.model_options["transformer_options"].update({key: 0.1})
          for key, name in SKIPPER_OPTIONS.items()}
SIGNS |= {f"{says.split(chr(39))[0]}: class {kind}": lambda patched, kind=kind: named(patched, kind) for kind, says in SKIPPER_MODELS.items()}


@pytest.mark.parametrize("before", [True, False], ids=["placed before", "placed after"])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
@pytest.mark.parametrize("name", QUICK)
def test_another_step_skipper_on_the_model_is_left_alone(name, node, before):
    skipper = lambda patched: node.execute(patched, 0.2, 0.15, 0.95, False).result[0]
    reports: list = []
    both = attached(skipper(model(name)), reports=reports) if before else skipper(attached(model(name), reports=reports))
    alone = sample(skipper(model(name)), name)
    assert torch.equal(sample(both, name), alone)
    (report,) = reports
    assert report.state == "off" and "is on the same model" in report.reason
    assert report.line() == f"Step Cache is off: {report.reason}"


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_the_other_step_skipper_is_named(node):
    reports: list = []
    sample(node.execute(attached(model("flux"), reports=reports), 0.2, 0.15, 0.95, False).result[0], "flux")
    assert reports[0].reason.startswith(node.__name__.removesuffix("Node"))


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("kind", SIGNS)
def test_every_sign_of_another_step_cache_turns_ours_off_and_the_log_says_so(kind, level, caplog):
    patched = tiny.patcher("flux")
    SIGNS[kind](patched)
    wanted = sample(patched, "flux")
    with caplog.at_level("INFO"):
        latent, report = run(patched, "flux", cached={"level": level})
    assert torch.equal(latent, wanted) and report.state == "off" and not report.each
    assert kind.split(":")[0] in report.reason and [record.message for record in caplog.records if "Step Cache" in record.message] == [report.line()]


@pytest.mark.parametrize("policy", ["interval", Never()], ids=["skips", "never"])
@pytest.mark.parametrize(("name", "level"), [
    (name, level) for name in tiny.UNSUPPORTED for level in CONCRETE])
def test_a_model_of_no_known_family_is_served_without_a_look_at_its_blocks(name, level, policy):
    latent, report = run(model(name), name, steps=9, cached={"level": level, "policy": policy})
    assert report.state == "ran" and report.model == type(network(model(name))).__name__
    assert all(decisions(report)) == torch.equal(latent, sample(model(name), name, steps=9)) == (policy != "interval")
    if level in OF_BLOCKS:
        assert report.level == "guided output" and f"{report.model} is of no known model family" in report.reason and report.reason in report.line()
    else:
        assert report.level == level and not report.reason


def test_a_model_of_no_known_family_has_no_blocks_for_a_policy_to_see():
    latent, report = run(model("wan_causal"), "wan_causal", cached={"policy": "first block"})
    assert torch.equal(latent, sample(model("wan_causal"), "wan_causal"))
    assert all(decisions(report)) and "'first block' must see its blocks, so everything is computed" in report.reason


def test_a_sampler_that_counts_on_every_evaluation_is_left_alone():
    sigmas = [1 - n / 50 for n in range(51)]
    assert "none may be skipped" in stand_down(sigmas, set(), set(), sampler="ar_video") and not stand_down(sigmas, set(), set(), sampler="euler")
    assert hasattr(comfy.k_diffusion.sampling, "sample_ar_video")


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("name", QUICK)
def test_a_run_of_few_steps_is_left_alone(name, steps, level, caplog):
    caplog.set_level("INFO")
    latent, report = run(model(name), name, steps=steps, cached={"level": level, "policy_knobs": {"warm_up": 1}})
    assert torch.equal(latent, sample(model(name), name, steps=steps))
    assert report.state == "off" and report.steps == steps and f"{steps} step" in report.reason
    assert report.as_dict()["computed_steps"] == 0 and report.evaluations == 0
    assert [record.message for record in caplog.records if record.name == "reprise"] == [report.line()] and report.reason in report.line()


def test_nine_steps_are_enough():
    _, report = run(model("flux"), "flux", steps=9)
    assert report.state == "ran" and not all(decisions(report))


def test_a_model_that_was_off_can_be_on_in_its_next_run():
    reports: list = []
    patched = attached(model("flux"), reports=reports)
    sample(patched, "flux", steps=4)
    latent = sample(patched, "flux")
    assert [report.state for report in reports] == ["off", "ran"]
    assert not torch.equal(latent, plain("flux"))


@pytest.mark.parametrize("at", [0, 5, 11])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_schedule_with_a_number_that_is_none_is_sampled_as_without_the_node(at, value):
    sigmas, reports = schedule("flux").clone(), []
    sigmas[at] = value
    without = sample(model("flux"), "flux", sigmas=sigmas)
    latent = sample(attached(model("flux"), reports=reports), "flux", sigmas=sigmas)
    assert torch.equal(latent.nan_to_num(7.0), without.nan_to_num(7.0))
    assert reports[0].state == "off" and f"sigma {at} is {value}" in reports[0].reason


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_schedule_that_goes_below_zero_is_sampled_as_without_the_node(cfg, sampler):
    sigmas, reports = torch.cat([schedule("flux")[:-1], torch.tensor([-0.05, -0.1])]), []
    without = sample(model("flux"), "flux", sigmas=sigmas, cfg=cfg, sampler=sampler)
    latent = sample(attached(model("flux"), "error control", reports=reports), "flux", sigmas=sigmas, cfg=cfg, sampler=sampler)
    assert torch.equal(latent.nan_to_num(7.0), without.nan_to_num(7.0))
    assert reports[0].state == "off" and "sigma 12 is -0.05, and below 0 there is no noise" in reports[0].reason


def test_zero_is_not_below_zero():
    assert not stand_down([*schedule("flux").tolist()[:-1], -0.0], set(), set())
