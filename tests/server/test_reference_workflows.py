"""The shipped workflows with references on a real server: encoded once and kept, the same picture every time, and off means off."""
from copy import deepcopy

import pytest

from testbed.client import Outcome, Server
from testbed.compared import CLEAR
from testbed.workflow import LATENTS, REFERENCES, nodes_of, system_of, without_reprise

STEPS = 8
SEEDS = ("seed", "noise_seed")


@pytest.fixture(scope="session")
def short(reference_prompt) -> dict:
    """The workflow at few steps."""
    return changed(reference_prompt, "steps", STEPS)


@pytest.fixture(scope="session")
def runs(server, short) -> tuple[Outcome, Outcome, Outcome]:
    """Without Reprise; with it and nothing kept; and once more."""
    without = server.run(without_reprise(short))
    server.run(CLEAR)
    return without, server.run(short), server.run(short)


def changed(prompt: dict, name: str, value) -> dict:
    """With another value for this input wherever one has it."""
    prompt = deepcopy(prompt)
    found = [node for node in prompt.values() if name in node["inputs"]]
    assert found, f"no node has the input {name}"
    for node in found:
        node["inputs"][name] = value
    return prompt


def pictures(outcome: Outcome) -> list[bytes]:
    return [image.tobytes() for image in outcome.images]


def line(prompt: dict, outcome: Outcome) -> str:
    [key] = [key for key, node in prompt.items() if node["class_type"] == system_of(prompt)]
    return outcome.lines[key]


def test_every_workflow_with_references_gives_one_picture_which_they_change(runs):
    without, first, _ = runs
    [picture] = first.images
    assert picture.height == 128 and all(low < high for low, high in picture.getextrema()), "the picture is a flat colour"
    assert pictures(first) != pictures(without)


def test_what_the_first_run_encodes_the_second_finds_kept_and_the_picture_is_the_same(short, runs):
    _, first, second = runs
    assert pictures(first) == pictures(second)
    if system_of(short) == LATENTS:
        return
    made_by_a_node = nodes_of(short, "Reprise_TemplateScalar")
    kept = "ready-made" if made_by_a_node else "from the bank"
    assert "exact" in line(short, first) and kept in line(short, second) and "encoded" not in line(short, second)
    assert ("encoded" in line(short, first)) != bool(made_by_a_node)


def test_another_seed_encodes_nothing_and_is_another_picture(server: Server, short, runs):
    [seed] = [name for node in short.values() for name in node["inputs"] if name in SEEDS]
    other = server.run(changed(short, seed, 7))
    assert pictures(other) != pictures(runs[1])
    assert "encoded" not in line(short, other)


def test_off_or_at_weight_0_the_picture_is_the_one_without_reprise_bit_for_bit(server: Server, short, runs):
    off = ("mode", "off") if system_of(short) == LATENTS else ("weight", 0.0)
    assert pictures(server.run(changed(short, *off))) == pictures(runs[0])


def test_frozen_references_are_told_as_approximate_with_their_measured_error(short, runs):
    if system_of(short) != LATENTS:
        assert "approximate" not in line(short, runs[2])
        return
    assert f"2 evaluations in full, {STEPS - 2} with frozen references (approximate)" in line(short, runs[2]) and "measured error" in line(short, runs[2])


def test_every_node_of_ours_has_all_inputs_of_this_version_and_the_engines_at_their_defaults(reference_prompt, object_info):
    for node in nodes_of(reference_prompt, "Reprise_"):
        inputs = object_info[node["class_type"]]["input"]
        known = inputs.get("required", {}) | inputs.get("optional", {})
        settings = {name: facts["default"] for name, (kind, facts) in known.items() if "default" in facts}
        assert settings.keys() <= node["inputs"].keys() <= known.keys()
        if node["class_type"] == REFERENCES:
            assert {name: node["inputs"][name] for name in settings} == settings
