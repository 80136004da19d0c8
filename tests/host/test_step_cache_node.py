"""The Step Cache node: what it takes, what it refuses, and that its menus are the registries."""
import asyncio
import inspect

import pytest
import torch
from harness import NAMES, decisions, model, plain, relative, sample

from pack import comfy_entrypoint
from pack.core import attach
from pack.core.knob import knobs, settings
from pack.core.presets import PRESETS, TOLERANCE, preset_settings
from pack.core.stepcache.corrections import CORRECTIONS
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS
from pack.nodes import GROUPS, notify
from pack.nodes import step_cache as group
from pack.nodes._api import io
from pack.nodes.choice import choice, chosen

REGISTRIES = {"policy": POLICIES, "predictor": PREDICTORS, "level": LEVELS, "correction": CORRECTIONS}
ENTRIES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


def execute(patcher=None, **inputs):
    """The node as the host runs it, on a clone of its class that knows its hidden inputs."""
    node = group.StepCache.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}})
    return node.execute(patcher or model("flux"), **{"preset": "custom", **inputs}).result[0]


def settings_on(patcher):
    return patcher.model_options["transformer_options"][attach.KEY].settings


def refusal(**inputs) -> str:
    """The sentence that comes back; one sentence, ready to be shown."""
    with pytest.raises(ValueError) as caught:
        execute(**inputs)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 250
    return message


def test_the_pack_offers_its_nodes_to_the_host():
    nodes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    assert group.StepCache in nodes and len(nodes) >= len(GROUPS)
    assert all(node.define_schema().node_id.startswith("Reprise_") for node in nodes)


def test_the_node_s_schema_is_valid_and_every_input_tells_what_it_is_for():
    schema = group.StepCache.GET_SCHEMA()
    schema.validate()
    assert all(entry.tooltip for entry in schema.inputs) and all(output.tooltip for output in schema.outputs)
    assert {entry.id for entry in schema.inputs} == set(inspect.signature(group.StepCache.execute).parameters)


def test_inputs_have_the_defaults_of_the_function_so_that_api_prompts_may_leave_them_out():
    parameters = inspect.signature(group.StepCache.execute).parameters
    for entry in group.StepCache.GET_SCHEMA().inputs:
        if getattr(entry, "default", None) is not None:
            assert entry.optional and parameters[entry.id].default == entry.default, entry.id
    assert group.StepCache.GET_SCHEMA().inputs[2].options == [*PRESETS, "custom"]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_registry_entry_has_its_knobs_in_the_menu(kind, name):
    menu = choice(kind, REGISTRIES[kind], tooltip="a tooltip")
    assert [option.key for option in menu.options] == list(REGISTRIES[kind])
    option = next(option for option in menu.options if option.key == name)
    entry = REGISTRIES[kind][name]()
    assert [widget.id for widget in option.inputs] == [knob.name for knob in knobs(entry)]
    for widget, knob in zip(option.inputs, knobs(entry), strict=True):
        assert widget.tooltip and not widget.tooltip[0].islower() and widget.tooltip.endswith(".")
        assert widget.default == knob.default == getattr(entry, knob.name)
        assert widget.optional
        if knob.metadata["wrong"]:
            assert isinstance(widget, io.String.Input)
        elif knob.metadata["choices"]:
            assert isinstance(widget, io.Combo.Input) and knob.default in widget.options
        elif isinstance(knob.default, bool):
            assert isinstance(widget, io.Boolean.Input)
        else:
            assert widget.min <= widget.default <= widget.max and widget.step > 0
            assert isinstance(widget, io.Int.Input if isinstance(knob.default, int) else io.Float.Input)


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_choice_without_knobs_has_the_defaults_and_knobs_may_be_told(kind, name):
    entry = REGISTRIES[kind][name]()
    assert chosen(kind, REGISTRIES[kind], {kind: name}) == entry
    assert chosen(kind, REGISTRIES[kind], {kind: name, **settings(entry)}) == entry
    assert chosen(kind, REGISTRIES[kind], {kind: name, **dict.fromkeys(settings(entry))}) == entry
    assert chosen(kind, REGISTRIES[kind], None) == next(iter(REGISTRIES[kind].values()))()
    for knob in knobs(entry):
        free = knob.metadata["wrong"] and next(text for text in ("2,1,1", "1.5x", "2-3") if not knob.metadata["wrong"](text))
        other = free if free else knob.metadata["choices"][-1] if knob.metadata["choices"] else knob.metadata["high"]
        other = not knob.default if isinstance(knob.default, bool) else other
        assert getattr(chosen(kind, REGISTRIES[kind], {kind: name, knob.name: other}), knob.name) == other


@pytest.mark.parametrize("kind", REGISTRIES)
def test_an_unknown_name_is_refused_with_the_known_ones(kind):
    message = refusal(**{kind: {kind: "teacach"}})
    assert message == f"unknown {kind} 'teacach'; known: {', '.join(REGISTRIES[kind])}"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_unknown_knob_is_refused_with_the_known_ones(kind, name):
    message = refusal(**{kind: {kind: name, "treshold": 0.1}})
    assert "'treshold'" in message and name in message
    assert all(knob.name in message for knob in knobs(REGISTRIES[kind][name])) or "none" in message


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_knob_out_of_its_range_is_refused_with_the_range(kind, name):
    for knob in knobs(REGISTRIES[kind][name]):
        if isinstance(knob.default, bool):
            continue        # has no range
        limits = knob.metadata
        wrong = ["nothing such"] if limits["choices"] or limits["wrong"] else [limits["low"] - 1, limits["high"] + 1]
        for value in wrong:
            message = refusal(**{kind: {kind: name, knob.name: value}})
            assert name in message and knob.name in message and str(value) in message
            told = (limits["wrong"](value),) if limits["wrong"] else limits["choices"] or (limits["low"], limits["high"])
            assert all(str(limit) in message for limit in told) or f"choose one of {len(told)}, such as" in message


def test_a_number_that_is_none_is_refused():
    assert "nan" in refusal(policy={"policy": "error control", "tolerance": float("nan")})


@pytest.mark.parametrize("level", [name for name, level in LEVELS.items() if not getattr(level, "gates", True)])
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.needs_forward])
def test_a_policy_that_must_see_blocks_is_refused_at_a_level_that_runs_none(policy, level):
    message = refusal(policy={"policy": policy}, level={"level": level})
    assert policy in message and level in message and "choose level" in message


def test_a_start_behind_the_end_is_refused():
    message = refusal(start_percent=0.8, end_percent=0.2)
    assert "0.8" in message and "0.2" in message and "start" in message


def test_an_unknown_preset_is_refused_with_the_known_ones():
    message = refusal(preset="turbo")
    assert "'turbo'" in message and all(name in message for name in (*PRESETS, "custom"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_the_settings_of_custom_aside(preset):
    patched = execute(preset=preset, policy={"policy": "interval"}, start_percent=0.9, end_percent=0.1, max_consecutive_skips=1)
    assert settings_on(patched) == preset_settings(preset)
    assert settings_on(patched).policy.tolerance == TOLERANCE[preset]


def test_custom_settings_arrive():
    got = settings_on(execute(
        policy={"policy": "interval", "interval": 3}, predictor={"predictor": "divided differences", "order": 2},
        level={"level": "block range", "first_blocks": 2, "last_blocks": 1}, start_percent=0.1, end_percent=0.9, max_consecutive_skips=7,
        correction={"correction": "variance"}, warm_up=2, last_steps=3, few_steps=True, budget_mib=5, storage="bf16", device="cpu")).as_dict()
    assert got == {
        "policy": {"name": "interval", "interval": 3, "warm_up": 3},
        "predictor": {"name": "divided differences", "order": 2, "coordinate": "step index"},
        "level": {"name": "block range", "first_blocks": 2, "last_blocks": 1},
        "start_percent": 0.1, "end_percent": 0.9, "max_consecutive_skips": 7, "preset": "custom",
        "correction": {"name": "variance"}, "warm_up": 2, "last_steps": 3, "few_steps": True, "budget_mib": 5, "storage": "bf16", "device": "cpu"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_memory_and_short_runs_to_the_user(preset):
    memory = {"few_steps": True, "budget_mib": 5, "storage": "bf16", "device": "cpu"}
    got = settings_on(execute(preset=preset, **memory)).as_dict()
    assert {name: got[name] for name in memory} == memory and got["policy"]["tolerance"] == TOLERANCE[preset]


def test_the_node_may_be_called_from_a_script():
    assert attach.KEY in group.StepCache.execute(model("flux")).result[0].model_options["transformer_options"]


def test_the_node_makes_no_tensor_and_leaves_its_input_alone():
    before = dict(model("flux").model_options["transformer_options"])
    patched = execute()
    assert patched is not model("flux") and patched.model is model("flux").model
    assert model("flux").model_options["transformer_options"] == before and not model("flux").wrappers
    hash(settings_on(patched))      # immutable all the way down, so it can hold no tensor


@pytest.mark.parametrize("name", NAMES)
def test_the_node_with_its_defaults_saves_evaluations_and_stays_near(name, caplog):
    with caplog.at_level("INFO", logger="reprise"):
        latent = sample(execute(model(name), preset="balanced"), name, steps=20)
    assert 0 < relative(latent, plain(name, steps=20)) < 0.1
    (line,) = [record.getMessage() for record in caplog.records if record.name == "reprise"]
    assert line.startswith("Step Cache: ") and "of 20 evaluations" in line and "skipped" in line
    assert "estimated error" in line and "% of the time of computing all" in line and torch.isfinite(latent).all()


def test_a_report_reaches_the_server_when_one_runs(monkeypatch):
    sent: list = []

    class Server:
        client_id = "client"

        def send_progress_text(self, text, node, client):
            sent.append(("text", text, node, client))

        def send_sync(self, event, data, client):
            sent.append((event, data, client))

    monkeypatch.setattr(notify, "running_server", Server)
    reports: list = []
    patched = attach.attach_step_cache(model("flux"), preset_settings("fast"), lambda report: (reports.append(report), notify.notifier("7")(report)))
    sample(patched, "flux")
    (text, event) = sent
    assert text == ("text", reports[0].line(), "7", "client")
    assert event == (notify.EVENT, reports[0].as_dict(), "client") and event[1]["node_id"] == "7"
    assert len(decisions(reports[0])) == 12
