"""Fused Kernels beside what else acts on a model: Step Cache, LoRA, ControlNet, patches of other nodes, references, patched weights."""
import comfy.sd
import pytest
import quantized
import test_gguf_pictures as gguf
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from edit_models import conditioning as with_references
from edit_models import references
from fusing import FEW, NAMES, counts, fused, made, ran
from harness import EVERY_SECOND, Control, attached, model, network, relative, sample
from quantized import drawn, nearness, write
from test_quantized_loader import lora, stock

from pack.core.quant.fusion import attach
from pack.core.quant.fusion.attach import Settings
from pack.core.quant.fusion.deferred import Deferred
from pack.core.quant.modulation import attach_modulation_cache
from pack.core.reference.latents import Settings as LatentSettings
from pack.core.reference.latents import attach_reference_latents
from pack.nodes.fused_kernels import FusedKernels as Node
from testbed import tiny


@pytest.mark.parametrize("first", [True, False], ids=["kernels first", "cache first"])
@pytest.mark.parametrize("level", ["block range", "model output"])
@pytest.mark.parametrize("name", NAMES)
def test_beside_a_step_cache_the_same_steps_are_skipped(name, level, first):
    reports, records = [], []
    cache = {"policy": EVERY_SECOND, "predictor": "hold", "level": level}
    alone = sample(attached(made(name), **cache), name)
    patcher = attached(fused(made(name), records), **cache, reports=reports) if first else fused(attached(made(name), **cache, reports=reports), records)
    latent = sample(patcher, name)
    assert any(not one.computed for one in reports[0].each) and "not built as expected" not in reports[0].line()
    assert relative(latent, alone) < 0.05
    assert not records[0].others and sum(count for what, count in records[0].fused.items() if "modulate" in what) > records[0].evaluations


@pytest.mark.parametrize("compute", ["requantized", "beside"])
def test_a_lora_acts_as_in_the_host(compute, tmp_path):
    patcher = stock(write("z_image", "int8_tensorwise", tmp_path / "model.safetensors"))
    patch = lora(patcher, 2.0)
    load = comfy.sd.load_lora_for_models if compute == "requantized" else comfy.sd.load_bypass_lora_for_models
    with torch.inference_mode():
        changed = load(patcher, None, patch, 1.0, 0)[0]
    records: list = []
    true, found, without = drawn("z_image", changed, 1), drawn("z_image", fused(changed, records), 1), drawn("z_image", patcher, 1)
    assert sum(records[0].fused.values()) > 0
    assert nearness(found, true) > nearness(without, true) + 15


@pytest.mark.parametrize(("name", "type"), [("flux", "Q4_K"), ("z_image", "Q6_K")])
def test_gguf_layers_that_compute_in_int8_take_codes_too(name, type, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "SUBJECTS", gguf.SUBJECTS)
    with torch.inference_mode():
        patcher = gguf.loaded(gguf.file(tmp_path, name, type), compute="int8")[0]
    assert gguf.packed(patcher)
    records: list = []
    true, found = drawn(name, patcher, 1), drawn(name, fused(patcher, records), 1)
    assert sum(count for what, count in records[0].fused.items() if what.endswith("int8")) > 0 and not records[0].left
    assert nearness(found, true) > 50


def test_gguf_layers_that_compute_as_floats_are_left_to_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "SUBJECTS", gguf.SUBJECTS)
    with torch.inference_mode():
        patcher = gguf.loaded(gguf.file(tmp_path, "z_image", "Q4_0"), compute="bf16")[0]
    records: list = []
    true, found = drawn("z_image", patcher, 1, steps=4), drawn("z_image", fused(patcher, records), 1, steps=4)
    assert nearness(found, true) > 80 and not [what for what in records[0].fused if what.endswith("int8")]
    assert records[0].left.keys() == {"in GGUF blocks that are computed as floats"}


def test_a_modulation_cache_gives_the_same_rows():
    records: list = []
    cached = lambda patcher: attach_modulation_cache(patcher)[0]
    true = sample(cached(made("flux_13m")), "flux_13m", steps=FEW)
    for patcher in (fused(cached(made("flux_13m")), records), cached(fused(made("flux_13m"), records))):
        assert relative(sample(patcher, "flux_13m", steps=FEW), true) < 0.02
    assert len(records) == 2 and all(record.fused["residual+norm+modulate+int8"] > 0 for record in records)


@pytest.mark.parametrize("name", NAMES[:1])
def test_controlnet_is_added_as_in_the_host(name):
    with_control = lambda seed: tiny.conditioning(name, seed, control=Control(3, 6, width=256), control_apply_to_uncond=False)
    sampling = {"steps": FEW, "positive": with_control(11), "negative": tiny.conditioning(name, 12)}
    true = sample(made(name), name, **sampling)
    latent, record = ran(made(name), name, sampling)
    assert relative(true, sample(made(name), name, steps=FEW)) > 0.05 > 0.02 > relative(latent, true)
    assert record.fused["residual+norm+modulate+int8"] > 0


@pytest.mark.parametrize("name", ["flux_13m", "z_image"])
def test_weights_that_the_host_patches_as_it_casts_them_are_patched(name):
    """As with low VRAM and a LoRA: the int8 layer is then one in full precision, and a norm's weight another one."""
    patcher = made(name)
    net = network(patcher)
    chosen = [net.layers[0].feed_forward.w2, net.layers[0].ffn_norm1, net.layers[0].attention_norm2] if name == "z_image" else [net.double_blocks[0].img_mlp[2]]
    plain = sample(patcher, name, steps=FEW)
    try:
        for module in chosen:
            module.weight_function = [lambda weight: weight * 1.5]
            module.comfy_cast_weights = True
        true = sample(patcher, name, steps=FEW)
        latent, record = ran(patcher, name)
    finally:
        for module in chosen:
            module.weight_function = []
    assert relative(true, plain) > 0.02 > relative(latent, true)
    assert isinstance(chosen[0].weight, QuantizedTensor) and record.left == {"in float32": record.evaluations}


class Seen:
    """A block replacement that sees what a block is given and gives."""

    def __init__(self):
        self.types = set()

    def __call__(self, args, options):
        out = options["original_block"](args)
        self.types |= {type(value) for value in (*args.values(), *out.values()) if isinstance(value, torch.Tensor)}
        return out


def test_other_nodes_see_plain_tensors():
    seen, patched = Seen(), []
    patcher = fused(made("flux_13m"))
    patcher.set_model_patch_replace(seen, "dit", "double_block", 1)
    patcher.set_model_patch_replace(seen, "dit", "single_block", 2)
    patcher.set_model_attn1_patch(lambda q, k, v, **more: patched.extend(map(type, (q, k, v))) or {"q": q, "k": k, "v": v})
    latent = sample(patcher, "flux_13m", steps=FEW)
    assert seen.types == {torch.Tensor} == set(patched)
    assert relative(latent, sample(made("flux_13m"), "flux_13m", steps=FEW)) < 0.02


def test_z_image_s_patches_after_blocks_see_plain_tensors():
    seen = []
    patcher = fused(made("z_image"))
    patcher.set_model_patch(lambda args: seen.extend(type(value) for value in args.values() if isinstance(value, torch.Tensor)) or args, "double_block")
    latent = sample(patcher, "z_image", steps=FEW)
    assert set(seen) == {torch.Tensor}
    assert relative(latent, sample(made("z_image"), "z_image", steps=FEW)) < 0.02


def test_attention_sees_plain_tensors():
    seen = []
    for name in NAMES:
        patcher = fused(made(name))
        patcher.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args, **more: seen.extend(
            type(value) for value in args if isinstance(value, torch.Tensor)) or function(*args, **more)
        sample(patcher, name, steps=1)
    assert set(seen) == {torch.Tensor} and not any(issubclass(kind, Deferred) for kind in seen)


def test_skip_layer_guidance_is_the_host_s():
    def guided(patcher):
        return SkipLayerGuidanceDiT.execute(patcher, 3.0, 0.0, 1.0, "1", "1").result[0]
    name = "flux_13m"
    assert relative(sample(guided(fused(made(name))), name, steps=FEW), sample(guided(made(name)), name, steps=FEW)) < 0.03


@pytest.mark.parametrize("mode", ["host", "freeze"])
def test_references_of_an_edit_model_are_read_as_in_the_host(mode):
    """FLUX.2 with a clean reference: modulated by parts, which is left to the host, or frozen by the pack's cache."""
    name = "flux2"
    prompts = {"positive": with_references(name, 11, *references(name, 3)), "negative": tiny.conditioning(name, 12)}
    host = made(name) if mode == "host" else attach_reference_latents(made(name), LatentSettings(mode="freeze"))
    true = sample(host, name, steps=FEW, **prompts)
    without = sample(made(name), name, steps=FEW)
    assert relative(sample(fused(host), name, steps=FEW, **prompts), true) < 0.3 * relative(without, true)


def test_a_step_cache_s_modulated_input_is_the_host_s():
    reports: list = []
    policy = {"policy": "TeaCache", "policy_knobs": {"threshold": 0.0, "coefficients": "flux"}}
    latent = sample(attached(fused(made("flux_13m")), **policy, level="block range", reports=reports), "flux_13m")
    assert reports[0].state == "ran" and relative(latent, sample(made("flux_13m"), "flux_13m")) < 0.05


def test_comfy_kitchen_takes_gelu_along_where_it_is_fast():
    latent, record = ran(made("flux_13m"), "flux_13m", kitchen=True)
    doubles = len(network(model("flux_13m")).double_blocks)
    assert counts(record)["gelu+int8 by comfy_kitchen"] == 2 * doubles and "gelu+int8" not in record.fused
    assert relative(latent, sample(made("flux_13m"), "flux_13m", steps=FEW)) < 0.02


def test_where_triton_does_not_work_comfy_kitchen_s_gelu_is_all_that_is_used():
    latent, record = ran(made("flux_13m"), "flux_13m", kitchen=True, forced=False)
    assert set(record.fused) == {"gelu+int8 by comfy_kitchen"} and "NVIDIA" in record.line()
    assert relative(latent, sample(made("flux_13m"), "flux_13m", steps=FEW)) < 0.02


def test_the_node_attaches_what_it_says():
    patcher = Node.execute(model("flux"), layers="int8").result[0]
    assert patcher is not model("flux") and patcher.model_options["transformer_options"][attach.KEY].settings == Settings("int8")
