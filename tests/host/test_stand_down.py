"""When the step cache must not act, sampling runs as without it, and it says why."""
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from harness import CONCRETE, QUICK, attached, decisions, model, plain, run, sample

from testbed import tiny


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
@pytest.mark.parametrize("name", tiny.UNSUPPORTED)
def test_a_model_of_no_known_family_runs_as_without_the_node(name, level):
    latent, report = run(model(name), name, cached={"level": level})
    assert torch.equal(latent, sample(model(name), name))
    assert report.state == "off" and "no known model family" in report.reason and type(model(name).model.diffusion_model).__name__ in report.reason


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("name", QUICK)
def test_a_run_of_few_steps_is_left_alone(name, steps, level):
    latent, report = run(model(name), name, steps=steps, cached={"level": level, "policy_knobs": {"warm_up": 1}})
    assert torch.equal(latent, sample(model(name), name, steps=steps))
    assert report.state == "off" and report.steps == steps and f"{steps} step" in report.reason
    assert report.as_dict()["computed_steps"] == 0 and report.evaluations == 0


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
