"""The shipped workflows with Step Cache on a real server: they run, they say what was skipped, and off means off."""
import re
from copy import deepcopy

import pytest

from testbed.client import Outcome, ServerError
from testbed.workflow import nodes_of, without_reprise


@pytest.fixture(scope="session")
def ran(server, prompt) -> Outcome:
    return server.run(prompt)


def with_step_cache(prompt: dict, **inputs) -> dict:
    """The prompt with Step Cache given its model and `inputs` only."""
    prompt = deepcopy(prompt)
    for node in nodes_of(prompt, "Reprise_StepCache"):
        node["inputs"] = {"model": node["inputs"]["model"], **inputs}
    return prompt


def pictures(outcome: Outcome) -> list[bytes]:
    return [image.tobytes() for image in outcome.images]


def test_every_workflow_with_step_cache_runs_and_gives_one_picture_or_all_frames_of_its_video(ran, prompt):
    frames = sum(node["inputs"].get("length", 1) for node in nodes_of(prompt, "Empty"))
    assert [image.size for image in ran.images] == [(128, 128)] * frames
    assert all(low < high for image in ran.images for low, high in image.getextrema()), "a picture is a flat colour"
    assert len({*pictures(ran)}) == frames, "frames of the video are the same"


def test_every_workflow_sends_one_report_whose_numbers_add_up(ran):
    [report] = ran.reports
    assert report["state"] == "ran"
    assert report["computed_steps"] + report["skipped_steps"] == len(report["each"])
    assert report["computed_steps"] == sum(evaluation["computed"] for evaluation in report["each"])
    assert report["skipped_steps"] > 0
    assert report["computed_steps"] <= report["evaluations"] < report["baseline_evaluations"]


def test_a_report_names_the_node_that_sent_it(ran, prompt):
    assert prompt[ran.reports[0]["node_id"]]["class_type"] == "Reprise_StepCache"


def test_switched_off_the_picture_is_the_one_without_the_node_bit_for_bit(server, prompt):
    off, baseline = server.run(with_step_cache(prompt, enabled=False)), server.run(without_reprise(prompt))
    assert pictures(off) == pictures(baseline)
    assert not baseline.reports


def test_the_same_workflow_gives_the_same_picture_again(server, prompt, ran):
    assert pictures(server.run(prompt)) == pictures(ran)


def test_a_model_is_all_that_step_cache_needs(server, prompt, ran):
    """The workflows hold the defaults, so leaving them out changes nothing."""
    assert pictures(server.run(with_step_cache(prompt))) == pictures(ran)


def test_every_workflow_gives_step_cache_all_inputs_of_this_version_at_their_defaults(prompt, object_info):
    [node] = nodes_of(prompt, "Reprise_StepCache")
    assert {name: value for name, value in node["inputs"].items() if name != "model"} == defaults(object_info["Reprise_StepCache"]["input"])


def defaults(inputs: dict, prefix: str = "") -> dict:
    """{input: default} as an API prompt has them; a dynamic combo stands at its first entry, with that entry's knobs."""
    found = {}
    for name, (kind, facts) in (inputs.get("required", {}) | inputs.get("optional", {})).items():
        if kind == "COMFY_DYNAMICCOMBO_V3":
            first = facts["options"][0]
            found |= {prefix + name: first["key"], **defaults(first["inputs"], f"{prefix}{name}.")}
        elif "default" in facts:
            found[prefix + name] = facts["default"]
    return found


@pytest.mark.parametrize(("inputs", "sentence"), [
    ({"policy": "zzz"}, "unknown policy 'zzz'; known: error control"),
    ({"level": 5}, "unknown level '5'"),
    ({"policy": "interval", "policy.frob": 3}, "interval has no setting 'frob'; it has: interval, warm_up"),
    ({"policy": "error control", "policy.interval": 3}, "error control has no setting 'interval'"),
    ({"policy.tolerance": 0.5}, "'policy.tolerance' was sent without 'policy'"),
])
def test_a_name_that_does_not_exist_is_an_error_and_not_the_default(server, prompt, inputs, sentence):
    with pytest.raises(ServerError, match=re.escape(sentence)):
        server.run(with_step_cache(prompt, preset="custom", **inputs))
