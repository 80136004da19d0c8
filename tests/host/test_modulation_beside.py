"""Modulation Cache beside the step cache, the reference caches and torch.compile."""
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from harness import attached, model, sample
from modulated import STEPS, Poison, cached
from test_references import conds, handle, used

from pack.core.quant.modulation import KEY, WRAPPERS
from pack.core.reference.bank import Bank
from pack.core.reference.latents import Settings, attach_reference_latents
from testbed import tiny


@pytest.mark.parametrize("first", [True, False], ids=["cache first", "cache last"])
@pytest.mark.parametrize("settings", [
    {"policy": "interval", "level": "block range"}, {"policy": "first block"}, {"policy": "TeaCache", "policy_knobs": {"coefficients": "flux"}},
    {"policy": "error control", "level": "guided output", "predictor": "automatic"},
], ids=lambda settings: settings["policy"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_step_cache_decides_and_predicts_as_without_it(name, settings, first):
    if name == "sd3" and settings["policy"] == "TeaCache":
        pytest.skip("TeaCache knows no modulated input of SD3")
    reports, told = [], []
    wanted = sample(attached(model(name), reports=reports, **settings), name)
    patcher = attached(cached(name), reports=told, **settings) if first else cached(name, attached(model(name), reports=told, **settings))
    assert torch.equal(sample(patcher, name), wanted)
    assert [each.computed for each in told[0].each] == [each.computed for each in reports[0].each] and not all(each.computed for each in told[0].each)


@pytest.mark.parametrize("first", [True, False], ids=["cache first", "cache last"])
def test_references_are_encoded_and_kept_beside_it(first):
    bank = Bank()
    wanted = sample(used(model("flux"), Bank()), "flux", steps=STEPS, **conds(handle()))
    patcher = used(cached("flux"), bank) if first else cached("flux", used(model("flux"), bank))
    assert torch.equal(sample(patcher, "flux", steps=STEPS, **conds(handle())), wanted)
    made = len(bank)
    assert torch.equal(sample(patcher, "flux", steps=STEPS, **conds(handle())), wanted) and made and len(bank) == made


@pytest.mark.parametrize("mode", ["freeze"])
def test_reference_latents_are_frozen_beside_it(mode):
    positive = tiny.conditioning("flux", 11, reference_latents=[tiny.noise("flux", 5)])
    wanted = sample(attach_reference_latents(model("flux"), Settings(mode)), "flux", steps=STEPS, positive=positive)
    got = sample(attach_reference_latents(cached("flux"), Settings(mode)), "flux", steps=STEPS, positive=positive)
    assert torch.equal(got, wanted)
    assert torch.equal(sample(cached("flux"), "flux", steps=STEPS, positive=positive), sample(model("flux"), "flux", steps=STEPS, positive=positive))


def test_edit_models_with_references_at_time_zero_get_both_vectors():
    positive = tiny.conditioning("qwen_image", 11, reference_latents=[tiny.noise("qwen_image", 5)], reference_latents_method="index_timestep_zero")
    wanted, records = sample(model("qwen_image"), "qwen_image", steps=STEPS, positive=positive), []
    assert not torch.equal(wanted, sample(model("qwen_image"), "qwen_image", steps=STEPS))
    patcher = cached("qwen_image", records=records)
    with Poison(patcher) as poison:
        assert torch.equal(sample(patcher, "qwen_image", steps=STEPS, positive=positive, callback=poison), wanted)
    assert not records[0].streamed


BLOCKS = ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.1"]


@pytest.mark.parametrize(("keys", "first"), [(["diffusion_model"], True), (BLOCKS, True), (BLOCKS, False)],
                         ids=["whole", "blocks, compiled first", "blocks, compiled last"])
def test_a_compiled_model_gives_the_same_picture(keys, first):
    torch.compiler.reset()
    patcher = model("flux").clone()
    wanted = sample(patcher, "flux", steps=STEPS)
    if first:
        set_torch_compile_wrapper(patcher, backend="eager", keys=keys)
    patcher = cached("flux", patcher)
    if not first:
        set_torch_compile_wrapper(patcher, backend="eager", keys=keys)
    for _ in range(2):
        with Poison(patcher) as poison:
            got = sample(patcher, "flux", steps=STEPS, callback=poison)
        assert (got - wanted).abs().max() <= 1e-4
    torch.compiler.reset()


@pytest.mark.parametrize("first", [True, False], ids=["cache first", "cache last"])
def test_the_model_is_heard_outside_of_all_others_wherever_the_node_stands(first):
    patcher = attached(cached("flux")) if first else cached("flux", attached(model("flux")))
    for kind, wrapper in WRAPPERS.items():
        keys = list(patcher.clone().wrappers[kind])
        assert keys[0] == KEY and len(keys) == 2 and patcher.wrappers[kind][KEY] == [wrapper]
