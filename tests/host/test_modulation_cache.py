"""Modulation Cache: bit-identical with weights that are gone after they were read once, and nothing stays behind."""
import json
import math

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from harness import attached, model, sample
from test_references import conds, handle, used

from pack.core.families import FAMILIES, family_of
from pack.core.quant import modulation
from pack.core.quant.modulation import KEY, attach_modulation_cache
from pack.core.quant.stand_in import StandIn, layers, original
from pack.core.reference.bank import Bank
from pack.core.reference.latents import Settings, attach_reference_latents
from testbed import tiny

SERVED = ["flux", "qwen_image", "sd3", "flux_longcat", "hunyuan_video", "hunyuan_image", "hidream_i1", "aura"]
NAMED = ["flux", "qwen_image", "sd3"]
STEPS = 5


def cached(name: str, patcher=None, records: list | None = None):
    clone, saving = attach_modulation_cache(patcher or model(name), (records if records is not None else []).append)
    assert not saving.why
    return clone


def network(patcher):
    return patcher.model.diffusion_model


def modulations(patcher) -> dict:
    """The host's own modules, by their paths in the model."""
    paths = family_of(network(patcher)).modulations(network(patcher))
    return {f"diffusion_model.{path}": original(patcher, f"diffusion_model.{path}") for path in paths}


class Poison:
    """From the given step on, no weight of a modulation is a number; afterwards they are what they were."""

    def __init__(self, patcher, step: int = 0):
        self.weights, self.step, self.done = [p for m in modulations(patcher).values() for p in m.parameters()], step, False

    def __enter__(self):
        self.kept = [weight.clone() for weight in self.weights]
        return self

    def __call__(self, step, *args):
        if step == self.step:
            self.done = True
            for weight in self.weights:
                weight.data.fill_(math.nan)

    def __exit__(self, *error):
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data.copy_(kept)
        assert self.done or error[0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", SERVED)
def test_the_weights_are_read_at_the_first_evaluation_and_never_again(name, cfg):
    wanted, records = sample(model(name), name, steps=STEPS, cfg=cfg), []
    patcher = cached(name, records=records)
    with Poison(patcher) as poison:
        got = sample(patcher, name, steps=STEPS, cfg=cfg, callback=poison)
    assert torch.equal(got, wanted)
    assert records[0].streamed == 0 and records[0].found and records[0].table


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("sampling", [
    {"sampler": "heun"}, {"sampler": "dpm_2"}, {"sampler": "dpmpp_2s_ancestral"}, {"sampler": "dpmpp_sde"}, {"sampler": "euler", "batch": 3},
    {"sampler": "res_multistep", "scheduler": "beta"},
], ids=lambda sampling: sampling["sampler"])
def test_the_picture_is_the_same_to_the_bit_with_every_kind_of_sampler(name, sampling):
    records = []
    assert torch.equal(sample(cached(name, records=records), name, steps=STEPS, **sampling), sample(model(name), name, steps=STEPS, **sampling))
    off_schedule = sampling["sampler"] in ("dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde")
    assert bool(records[0].streamed) == off_schedule and (records[0].streamed < STEPS if off_schedule else True)


def test_a_sigma_off_the_schedule_reads_the_weights_again():
    patcher = cached("flux")
    with Poison(patcher) as poison:
        assert not sample(patcher, "flux", steps=STEPS, sampler="dpm_2", callback=poison).isfinite().all()


# patched weights -------------------------------------------------------------------------------------------------------
def lora(name: str, seed: int = 8) -> dict:
    """One that changes a modulation and another layer, weight and bias."""
    patcher = model(name)
    path, module = list(modulations(patcher).items())[1]
    (key, layer), other = next(layers(module, path)), next(k for k in patcher.model.state_dict() if "attn" in k and k.endswith("qkv.weight") or "to_q.weight" in k)
    generator = torch.Generator().manual_seed(seed)
    made = {f"{key}.diff_b": torch.randn(layer.bias.shape, generator=generator)}
    for layer_key, shape in ((key, layer.weight.shape), (other.removesuffix(".weight"), patcher.model.state_dict()[other].shape)):
        made[f"{layer_key}.lora_up.weight"] = torch.randn(shape[0], 4, generator=generator) * 0.2
        made[f"{layer_key}.lora_down.weight"] = torch.randn(4, shape[1], generator=generator) * 0.2
    return made


def with_lora(patcher, name: str, strength: float, bypass: bool = False):
    load = comfy.sd.load_bypass_lora_for_models if bypass else comfy.sd.load_lora_for_models
    return load(patcher, None, lora(name), strength, 0.0)[0]


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


# the host's side -------------------------------------------------------------------------------------------------------
def test_the_host_loads_no_weight_of_a_modulation():
    mine = tiny.patcher("flux")
    there = modulations(mine)
    patcher, meta = cached("flux", mine), torch.device("meta")
    patcher.patch_model(meta)
    loaded = {name for name, parameter in patcher.model.named_parameters() if parameter.device == meta}
    assert loaded and not any("_mod." in name or "modulation" in name for name in loaded)
    assert loaded | {f"{path}.{name}" for path, module in there.items() for name, _ in module.named_parameters()} == {key for key in mine.model.state_dict() if key.startswith("diffusion_model.")}
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


# runs ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMED)
def test_an_interrupt_while_it_computes_ahead_leaves_the_model_as_it_was(name):
    wanted, records = sample(model(name), name, steps=STEPS), []
    patcher = cached(name, records=records)
    sample(patcher, name, steps=1)
    states = {layer: dict(vars(layer)) for module in modulations(patcher).values() for layer in module.modules()}
    middle, calls = list(modulations(patcher).values())[2], []
    def stop(*_):
        calls.append(0)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException()
    hook = middle.register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patcher, name, steps=STEPS)
    finally:
        hook.remove()
    assert patcher.get_attachment(KEY).table is None and len(records) == 2
    assert all(vars(layer).keys() == state.keys() and all(vars(layer)[key] is value for key, value in state.items()) for layer, state in states.items())
    assert torch.equal(sample(patcher, name, steps=STEPS), wanted)


@pytest.mark.parametrize("name", NAMED)
def test_a_table_with_little_room_is_filled_again_and_again(name, monkeypatch):
    patcher, records = cached(name, records=(records := [])), records
    row = sum(layer.weight.shape[0] * 4 for module in modulations(patcher).values() for _, layer in layers(module, ""))
    for rows in (0.5, 1, 5, 9):
        monkeypatch.setattr(modulation, "LEAST_TABLE", int(row * rows))
        monkeypatch.setattr(modulation, "TABLE_SHARE", 0)
        assert torch.equal(sample(patcher, name, steps=8), sample(model(name), name, steps=8))
        assert records[-1].table <= row * rows and bool(records[-1].streamed) == (rows < 2)


def batch(name: str, *seeds: int) -> list:
    texts = [tiny.conditioning(name, seed)[0] for seed in seeds]
    more = {key: torch.cat([text[1][key] for text in texts]) for key in texts[0][1]}
    return [[torch.cat([text for text, _ in texts]), more]]


def areas(name: str) -> list:
    """A prompt over all, one for a part, one for the second half of the run."""
    first, second, third = (tiny.conditioning(name, seed) for seed in (11, 13, 14))
    second[0][1].update(area=(4, 4, 0, 4), strength=0.7)
    third[0][1].update(start_percent=0.5, end_percent=1.0)
    return first + second + third


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_batches_of_prompts_regions_and_times_have_rows_of_their_own(name):
    for positive, more in ((batch(name, 21, 22), {"batch": 2}), (areas(name), {})):
        wanted, records = sample(model(name), name, steps=STEPS, positive=positive, **more), []
        patcher = cached(name, records=records)
        assert torch.equal(sample(patcher, name, steps=STEPS, positive=positive, **more), wanted) and not records[0].streamed


def test_guidance_that_asks_once_more_gets_rows_of_its_own():
    skipping = SkipLayerGuidanceDiT.execute(model("flux"), 2.0, 0.0, 1.0, "0", "1").result[0]
    patcher, wanted = cached("flux", skipping, records := []), sample(skipping, "flux", steps=STEPS)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))
    with Poison(patcher) as poison:
        assert torch.equal(sample(patcher, "flux", steps=STEPS, callback=poison), wanted)
    assert not records[0].streamed


def test_a_patch_that_writes_into_the_vector_is_seen():
    def patched(patcher):
        def block(args, more):
            args["vec"].mul_(1.5)
            return more["original_block"](args)
        patcher = patcher.clone()
        patcher.set_model_patch_replace(block, "dit", "double_block", 1)
        return patcher
    wanted = sample(patched(model("flux")), "flux", steps=STEPS)
    assert torch.equal(sample(patched(cached("flux")), "flux", steps=STEPS), wanted)
    assert not torch.equal(wanted, sample(model("flux"), "flux", steps=STEPS))


def test_a_model_that_cannot_be_heard_is_streamed_and_says_so():
    patcher, records = cached("sd3", records=(records := [])), records
    def refusing(x, timesteps, **kwargs):
        if not kwargs["transformer_options"].get("wrappers"):
            raise TypeError("this model is called with wrappers alone")
        return forward(x, timesteps, **kwargs)
    forward = network(patcher).forward
    network(patcher).forward = refusing
    try:
        got = sample(patcher, "sd3", steps=STEPS)
    finally:
        del network(patcher).forward
    assert torch.equal(got, sample(model("sd3"), "sd3", steps=STEPS))
    assert records[0].streamed == STEPS and "called with wrappers alone" in records[0].line()


# beside others ---------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled last"])
@pytest.mark.parametrize("keys", [["diffusion_model"], ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.1"]], ids=["whole", "blocks"])
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


# what is served --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.modulation], ids=lambda family: family.name)
def test_every_family_that_tells_its_modulation_has_it_and_is_served_exactly_or_not_at_all(family):
    name = tiny.OF_FAMILY[family.name][0]
    assert modulations(model(name))
    patcher, saving = attach_modulation_cache(model(name))
    assert (patcher is model(name)) == bool(saving.why)
    if not saving.why:
        assert torch.equal(sample(patcher, name, steps=STEPS), sample(model(name), name, steps=STEPS))


@pytest.mark.parametrize(("name", "why"), [("sd15_like", "of no model family whose modulation is known"), ("wan_causal", "of no model family")])
def test_a_model_whose_modulation_is_not_known_is_handed_on(name, why):
    patcher, saving = attach_modulation_cache(model(name))
    assert patcher is model(name) and why in saving.line()


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
    assert all(isinstance(layer.weight, QuantizedTensor) for path, module in modulations(mine).items() if "final" not in path for _, layer in layers(module, path))
    full = with_lora(mine, "flux", strength) if strength else mine
    wanted = sample(full, "flux", steps=STEPS)
    patcher, saving = attach_modulation_cache(full)
    assert torch.equal(sample(patcher, "flux", steps=STEPS), wanted) and wanted.isfinite().all()
    assert saving.aside == sum(comfy.model_management.module_size(module) for module in modulations(mine).values())
    assert 3 * saving.aside < 1.2 * attach_modulation_cache(model("flux"))[1].aside
    assert torch.equal(sample(full, "flux", steps=STEPS), wanted)
