"""Modulation Cache and the model's weights: patches, formats, loading, saving; and nothing stays on the model."""
import json

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from harness import model, sample
from modulated import NAMED, STEPS, cached, lora, modulations, network, with_lora

from pack.core.quant.modulation import KEY, attach_modulation_cache
from pack.core.quant.stand_in import StandIn, layers, original
from testbed import tiny


@pytest.mark.parametrize("bypass", [False, True], ids=["patched", "bypass"])
@pytest.mark.parametrize("before", [True, False], ids=["before the cache", "after it"])
@pytest.mark.parametrize("name", NAMED)
def test_a_lora_on_a_modulation_acts_as_without_the_cache(name, before, bypass):
    plain = sample(model(name), name, steps=STEPS)
    for strength in (1.0, 0.5, 0.0):
        wanted = sample(with_lora(model(name), name, strength, bypass), name, steps=STEPS)
        assert torch.equal(wanted, plain) == (strength == 0.0)
        patcher = cached(name, with_lora(model(name), name, strength, bypass)) if before else with_lora(cached(name), name, strength, bypass)
        assert torch.equal(sample(patcher, name, steps=STEPS), wanted)
    assert torch.equal(sample(model(name), name, steps=STEPS), plain)


def test_a_lora_finds_the_modulations_of_a_model_that_is_loaded_with_the_cache():
    patcher = cached("flux")
    sample(patcher, "flux", steps=1)
    assert isinstance(network(patcher).double_blocks[0].img_mod, StandIn)
    wanted = with_lora(model("flux").clone(), "flux", 1.0)
    assert with_lora(patcher, "flux", 1.0).patches.keys() == wanted.patches.keys() and len(wanted.patches) == 3


def test_a_merged_model_has_the_merged_modulation():
    other = tiny.patcher("flux", seed=3)

    def merged(patcher, donor):
        clone = patcher.clone()
        for key, patch in donor.get_key_patches("diffusion_model.").items():
            clone.add_patches({key: patch}, 0.4, 0.6)
        return clone
    wanted = sample(merged(model("flux"), other), "flux", steps=STEPS)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))
    assert torch.equal(sample(merged(cached("flux"), other), "flux", steps=STEPS), wanted)
    assert torch.equal(sample(merged(model("flux"), cached("flux", other)), "flux", steps=STEPS), wanted)


def test_a_function_over_a_weight_is_called():

    def doubled(patcher):
        patcher.add_weight_wrapper("diffusion_model.double_blocks.0.img_mod.lin.weight", lambda weight: weight * 2)
        return patcher
    wanted = sample(doubled(model("flux").clone()), "flux", steps=STEPS)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))
    assert torch.equal(sample(doubled(cached("flux")), "flux", steps=STEPS), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_compute_type_gives_what_it_gives_without_the_cache(dtype):

    def narrow(patcher):
        patcher = patcher.clone()
        patcher.set_model_compute_dtype(dtype)
        return patcher
    wanted = sample(narrow(model("flux")), "flux", steps=STEPS)
    assert torch.equal(sample(narrow(cached("flux")), "flux", steps=STEPS), wanted)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_hook_on_a_modulation_has_the_cache_stand_aside(name):
    hooks = comfy.hooks.create_hook_lora(lora(name), 1.0, 1.0)
    positive, records = tiny.conditioning(name, 11, hooks=hooks), []
    wanted = sample(model(name), name, steps=STEPS, positive=positive)
    assert not torch.equal(wanted, sample(model(name), name, steps=STEPS))
    patcher = cached(name, records=records)
    assert torch.equal(sample(patcher, name, steps=STEPS, positive=positive), wanted)
    assert "a hook changes the weights" in records[0].line()
    assert torch.equal(sample(patcher, name, steps=STEPS), sample(model(name), name, steps=STEPS)) and records[1].aside


def packed(format: str, **how):
    """A patcher of the tiny FLUX whose blocks are in 8 bits, opened by the host's loader."""
    tensors, metadata = tiny.weights("flux")
    for key, tensor in list(tensors.items()):
        if "blocks." in key and tensor.ndim == 2:
            layer, layout = key.removesuffix(".weight"), QUANT_ALGOS[format]["comfy_tensor_layout"]
            del tensors[key]
            tensors |= QuantizedTensor.from_float(tensor, layout, **how).state_dict(f"{layer}.weight")
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    with torch.inference_mode():    # as a graph is run; a parameter from outside of it cannot be moved within
        return comfy.sd.load_diffusion_model_state_dict(tensors, metadata=metadata)


@pytest.mark.parametrize("strength", [0.0, 1.0], ids=["as it is", "with a LoRA"])
@pytest.mark.parametrize("format", ["int8_tensorwise", "float8_e4m3fn"])
def test_weights_in_8_bits_are_computed_with_as_the_host_does(format, strength):
    mine = packed(format)
    in_blocks = [layer for path, module in modulations(mine).items() if "blocks" in path for _, layer in layers(module, path)]
    assert in_blocks and all(isinstance(layer.weight, QuantizedTensor) for layer in in_blocks)
    full = with_lora(mine, "flux", strength) if strength else mine
    wanted = sample(full, "flux", steps=STEPS)
    patcher, saving = attach_modulation_cache(full)
    assert torch.equal(sample(patcher, "flux", steps=STEPS), wanted) and wanted.isfinite().all()
    assert saving.aside == sum(comfy.model_management.module_size(module) for module in modulations(mine).values())
    assert 3 * saving.aside < 1.2 * attach_modulation_cache(model("flux"))[1].aside
    assert torch.equal(sample(full, "flux", steps=STEPS), wanted)


def test_the_host_loads_no_weight_of_a_modulation():
    mine = tiny.patcher("flux")
    there = modulations(mine)
    patcher, meta = cached("flux", mine), torch.device("meta")
    patcher.patch_model(meta)
    loaded = {name for name, parameter in patcher.model.named_parameters() if parameter.device == meta}
    assert loaded and not any("_mod." in name or "modulation" in name for name in loaded)
    others = {f"{path}.{name}" for path, module in there.items() for name, _ in module.named_parameters()}
    assert loaded | others == {key for key in mine.model.state_dict() if key.startswith("diffusion_model.")}
    assert all(parameter.device.type == "cpu" for module in there.values() for parameter in module.parameters())
    assert patcher.loaded_size() == patcher.model_size() < mine.model_size()


@pytest.mark.parametrize("name", NAMED)
def test_the_size_told_to_the_host_is_that_of_the_other_weights(name):
    aside = sum(comfy.model_management.module_size(module) for module in modulations(model(name)).values())
    patcher, saving = attach_modulation_cache(model(name))
    assert saving.aside == aside > 0 and patcher.model_size() == model(name).model_size() - aside == patcher.clone().model_size()
    again, told = attach_modulation_cache(patcher)
    assert told == saving and again.model_size() == patcher.model_size() and again.patches_uuid == patcher.patches_uuid
    sample(patcher, name, steps=1)
    assert attach_modulation_cache(model(name))[0].model_size() == patcher.model_size()


def test_models_with_and_without_the_cache_are_loaded_anew_on_the_way_from_one_to_the_other():
    plain, one, same = model("flux").clone(), cached("flux"), cached("flux")
    assert one.patches_uuid == same.patches_uuid != plain.patches_uuid


@pytest.mark.parametrize("name", NAMED)
def test_nothing_stays_on_the_model(name):
    wanted, before = sample(model(name), name, steps=STEPS), modulations(model(name))
    patcher = cached(name)
    sample(patcher, name, steps=STEPS)
    seat = patcher.get_attachment(KEY)
    assert seat.table is None and "reprise.modulation.run" not in patcher.model_options["transformer_options"]
    assert torch.equal(sample(model(name), name, steps=STEPS), wanted)
    there = dict(model(name).model.named_modules())
    assert all(there[path] is module for path, module in before.items()) and not any(isinstance(m, StandIn) for m in there.values())
    assert not model(name).object_patches and not model(name).wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(KEY)


def test_a_saved_model_is_complete_and_patched():
    patcher, plain = with_lora(cached("flux"), "flux", 1.0), with_lora(model("flux"), "flux", 1.0)
    def saved(one):
        comfy.model_management.load_models_gpu([one])
        return {key: tensor.to("cpu").clone() for key, tensor in one.state_dict_for_saving().items()}
    got, wanted = saved(patcher), saved(plain)
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_a_clone_with_a_model_of_its_own_has_its_own_modulations():
    mine, other = cached("flux"), tiny.patcher("flux", seed=3)
    clone = mine.clone(model_override=(other.model, ({}, {}, {}, set())))
    assert all(value.held is original(other, name) for name, value in clone.object_patches.items())
    assert clone.get_attachment(KEY) is not mine.get_attachment(KEY) is mine.clone().get_attachment(KEY)
    assert torch.equal(sample(clone, "flux", steps=STEPS), sample(tiny.patcher("flux", seed=3), "flux", steps=STEPS))


def test_a_module_that_another_node_has_replaced_is_left_to_it():
    patched = model("flux").clone()
    zero = torch.nn.Linear(128, 768)
    patched.add_object_patch("diffusion_model.double_blocks.0.img_mod.lin", zero)
    patcher, _ = attach_modulation_cache(patched)
    assert "diffusion_model.double_blocks.0.img_mod" not in patcher.object_patches and "diffusion_model.double_blocks.0.txt_mod" in patcher.object_patches
    wanted = sample(patched, "flux", steps=STEPS)
    assert torch.equal(sample(patcher, "flux", steps=STEPS), wanted)
    later = cached("flux")
    later.add_object_patch("diffusion_model.double_blocks.0.img_mod.lin", zero)
    assert torch.equal(sample(later, "flux", steps=STEPS), wanted)
    assert torch.equal(sample(model("flux"), "flux", steps=STEPS), sample(tiny.patcher("flux"), "flux", steps=STEPS))
