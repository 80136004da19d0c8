"""A text of any length, wrong or right, is quoted in an error or a reason by its beginning."""
import comfy.samplers
import folder_paths
import pytest
import torch
from harness import decisions, model, sample, schedule

from pack.core.attach import attach_step_cache
from pack.core.knob import LONG, knobs
from pack.core.run import Settings
from pack.core.stepcache.levels.block_ranges import BlockRanges
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.policies.first_block import FirstBlock
from pack.core.stepcache.policies.profile import FromProfile
from pack.core.stepcache.predictors.automatic import Automatic
from pack.core.stepcache.profiles import Plan, Profile
from pack.nodes._api import io
from pack.nodes.step_cache import MENUS, StepCache
from pack.nodes.step_cache_calibrate import StepCacheCalibrate
from testbed import tiny

LENGTH = 3_000_000
WRONG = "x" * LENGTH
CUSTOM = {"preset": "custom"}
TEXTS = [(kind, name, knob.name) for kind, registry in MENUS.items() for name, entry in registry.items() for knob in knobs(entry)
         if knob.metadata["choices"] or knob.metadata["wrong"]]


def sentence(call, *arguments, **inputs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **inputs)
    message = str(caught.value)
    assert 20 < len(message) < LONG + 400 and "\n" not in message and "x" * (LONG - 20) in message, message[:1000]
    return message


def sent(inputs: dict):
    """The node as the host calls it after a prompt that sent these."""
    hidden = {io.Hidden.unique_id: "7", io.Hidden.prompt: {"7": {"inputs": inputs}}}
    return StepCache.PREPARE_CLASS_CLONE({"hidden_inputs": hidden}).execute(model("flux"), **CUSTOM)


@pytest.mark.parametrize(("kind", "name", "knob"), TEXTS)
def test_of_a_wrong_setting(kind, name, knob):
    sentence(StepCache.execute, model("flux"), **CUSTOM, **{kind: {kind: name, knob: WRONG}})


@pytest.mark.parametrize("kind", MENUS)
def test_of_a_name_and_a_setting_that_do_not_exist(kind):
    sentence(StepCache.execute, model("flux"), **CUSTOM, **{kind: {kind: WRONG}})
    first = next(iter(MENUS[kind]))
    sentence(StepCache.execute, model("flux"), **CUSTOM, **{kind: {kind: first, WRONG: 1}})
    sentence(sent, {kind: WRONG})
    sentence(sent, {kind: first, f"{kind}.{WRONG}": 1})
    sentence(sent, {f"{kind}.{WRONG}": 1})
    many = sentence(sent, {kind: first} | {f"{kind}.{'x' * LONG}{n}": 1 for n in range(10_000)})
    assert "no setting" in many


def test_of_a_preset():
    sentence(StepCache.execute, model("flux"), preset=WRONG)


def test_of_a_name_for_a_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    sentence(StepCacheCalibrate.execute, model("flux"), tiny.conditioning("flux", 11), tiny.conditioning("flux", 12), comfy.samplers.ksampler("euler"),
             schedule("flux", 9), {"samples": torch.full((1, 16, 8, 8), 1e-6)}, name=WRONG)
    with pytest.raises(ValueError, match="name is 'None'; expected the name of a profile"):
        StepCacheCalibrate.execute(model("flux"), tiny.conditioning("flux", 11), tiny.conditioning("flux", 12), comfy.samplers.ksampler("euler"),
                                   schedule("flux", 9), {"samples": torch.full((1, 16, 8, 8), 1e-6)}, name=None)


def test_of_ranges_that_are_right_in_form_but_do_not_fit():
    long = BlockRanges(f"0, 1{' ' * LENGTH}, 999999")
    with pytest.raises(ValueError, match="begins with block 0; begin at 1 or later") as caught:
        Settings(FirstBlock(), Automatic(), long)
    assert len(str(caught.value)) < 400
    reports = []
    sample(attach_step_cache(model("flux"), Settings(POLICIES["interval"](), Automatic(), long), reports.append), "flux")
    assert "names a block behind the last" in reports[0].reason and len(reports[0].reason) < 500
    assert not all(decisions(reports[0])), "another level stands in"


def test_of_a_target_that_is_right_in_form():
    target = f"{'0' * LENGTH}9x"
    plans = {6: Plan((0, 2, 4, 6, 8, 11), 0.1), 12: Plan(tuple(range(12)), 0.0)}
    profile = Profile.__new__(Profile)
    object.__setattr__(profile, "facts", type("Facts", (), {"steps": 12}))
    plan, note = FromProfile("p", target).planned(profile, plans)
    assert plan is plans[6] and "no fewer than 6" in note and len(note) < 300
