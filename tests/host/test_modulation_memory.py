"""What Modulation Cache saves at the published sizes, by the host's own account: its model classes on the meta device, without a byte of weights."""
import json
from functools import cache

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import pytest
import torch
from harness import model, sample
from torch import nn

from pack.core.families import FAMILIES, family_of
from pack.core.quant.modulation import KEY, attach_modulation_cache, give_pages_back
from pack.core.quant.stand_in import layers, original
from pack.nodes import modulation_cache as group
from testbed import tiny

GIB = 1 << 30
FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "vec_in_dim": 768, "depth": 19,
        "depth_single_blocks": 38, "txt_ids_dims": []}
FLUX2 = {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0, "axes_dim": [32] * 4, "theta": 2000,
         "patch_size": 1, "qkv_bias": False, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False}
SD3 = {"in_channels": 16, "pos_embed_scaling_factor": None, "input_size": None, "num_patches": None, "patch_size": 2, "adm_in_channels": 2048, "qk_norm": "rms"}


def sd3(depth: int, **more) -> dict:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return SD3 | {"depth": depth, "context_embedder_config": embedder, **more}


MODELS = {      # published sizes: the host's class, and what its loader finds out
    "flux1_dev": ("Flux", FLUX),
    "flux1_schnell": ("FluxSchnell", FLUX | {"guidance_embed": False}),
    "flux1_fill": ("FluxInpaint", FLUX | {"in_channels": 96}),
    "qwen_image": ("QwenImage", {"image_model": "qwen_image", "num_layers": 60, "in_channels": 64}),
    "sd35_large": ("SD3", sd3(38, pos_embed_max_size=192)),
    "sd35_medium": ("SD3", sd3(24, pos_embed_max_size=384, x_block_self_attn_layers=list(range(13)))),
    "hunyuan_video": ("HunyuanVideo", {key: value for key, value in FLUX.items() if key != "txt_ids_dims"} | {
        "image_model": "hunyuan_video", "depth": 20, "depth_single_blocks": 40, "theta": 256, "patch_size": [1, 2, 2], "byt5": False,
        "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow": False, "meanflow_sum": False}),
    "hidream_i1": ("HiDream", {
        "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32,
        "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048, "num_routed_experts": 4,
        "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128), "llama_layers": list(range(48))}),
    "auraflow": ("AuraFlow", {"cond_seq_dim": 2048, "max_seq": 64 * 64}),
    "flux2_dev": ("Flux2", FLUX2 | {
        "hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48, "context_in_dim": 15360, "guidance_embed": True}),
    "flux2_klein_4b": ("Flux2", FLUX2 | {
        "hidden_size": 3072, "num_heads": 24, "depth": 5, "depth_single_blocks": 20, "context_in_dim": 7680, "guidance_embed": False}),
    "z_image": ("ZImage", {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "n_layers": 30, "cap_feat_dim": 2560, "qk_norm": True, "n_heads": 30,
        "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
        "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}),
    "wan22_14b": ("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16, "dim": 5120, "ffn_dim": 13824, "text_dim": 4096,
        "num_heads": 40, "num_layers": 40}),
    "chroma": ("Chroma", {key: value for key, value in FLUX.items() if key not in ("guidance_embed", "vec_in_dim")} | {
        "image_model": "chroma", "vec_in_dim": None, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}),
}
SAVED = {   # GiB at 16 bits
    "flux1_dev": 6.05, "flux1_schnell": 6.05, "flux1_fill": 6.05, "qwen_image": 12.66, "sd35_large": 5.00, "sd35_medium": 1.43, "hunyuan_video": 6.37,
    "hidream_i1": 4.71, "auraflow": 4.25,
}
LEFT_ALONE = [name for name in MODELS if name not in SAVED]


@cache
def network(name: str) -> nn.Module:
    """bf16, on the meta device."""
    host, config = MODELS[name]
    made = getattr(comfy.supported_models, host)(dict(config))
    made.set_inference_dtype(torch.bfloat16, None)
    made.custom_operations = comfy.ops.disable_weight_init
    return made.get_model({}, "", device=torch.device("meta"))


def patcher(name: str, loader=comfy.model_patcher.ModelPatcher):
    return loader(network(name), load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def quantized(name: str, format: str) -> comfy.model_patcher.ModelPatcher:
    """The matrices of the blocks in 8 bits, a scale for each row (int8) or each matrix (fp8), as the host's loader would make them of a file."""
    host, config = MODELS[name]
    made = getattr(comfy.supported_models, host)(dict(config))
    made.set_inference_dtype(torch.bfloat16, None)
    made.custom_operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    model = made.get_model({}, "", device=torch.device("meta"))
    state = {}
    for key, tensor in network(name).diffusion_model.state_dict().items():
        if "blocks." not in key or tensor.ndim != 2 or not key.endswith(".weight"):
            state[key] = tensor
            continue
        layer = key.removesuffix(".weight")
        state[key] = torch.empty_like(tensor, dtype=torch.int8 if format == "int8_tensorwise" else torch.float8_e4m3fn)
        rows = (tensor.shape[0], 1) if format == "int8_tensorwise" else ()
        state[f"{layer}.weight_scale"] = torch.empty(rows, dtype=torch.float32, device="meta")
        state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    model.diffusion_model.load_state_dict(state, strict=False, assign=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


@pytest.mark.parametrize("name", SAVED)
def test_the_size_that_the_host_sees_falls_by_what_the_help_page_tells(name):
    full = patcher(name)
    size = full.model_size()
    clone, saving = attach_modulation_cache(full)
    assert abs((size - clone.model_size()) / GIB - SAVED[name]) < 0.01 and saving.aside == size - clone.model_size()
    assert clone.model_size() == clone.clone().model_size() and full.model_size() == size == comfy.model_management.module_size(full.model)


def test_flux_and_qwen_image_lose_as_much_as_was_promised():
    """6.1 and 12.7 GiB at 16 bits, within 0.1, and half of that in 8."""
    for name, promised in (("flux1_dev", 6.1), ("qwen_image", 12.7)):
        full = patcher(name)
        saved = (full.model_size() - attach_modulation_cache(full)[0].model_size()) / GIB
        assert abs(saved - promised) < 0.1
    for name, format, before, after in (("flux1_dev", "int8_tensorwise", 11.1, 8.1), ("qwen_image", "float8_e4m3fn", 19.1, 12.7)):
        full = quantized(name, format)
        assert abs(full.model_size() / GIB - before) < 0.1
        assert abs(attach_modulation_cache(full)[0].model_size() / GIB - after) < 0.1


def test_the_host_loads_as_much_less():
    """What its loader goes through, layer by layer, with the stand-ins in place."""
    full = patcher("flux1_dev")
    everything = sum(entry[1] for entry in full._load_list())
    clone, saving = attach_modulation_cache(full)
    clone.patch_model(load_weights=False)
    try:
        assert everything - sum(entry[1] for entry in clone._load_list()) == saving.aside
        assert comfy.model_management.module_size(clone.model) == full.model_size(), "a state dict that is not complete"
    finally:
        clone.unpatch_model(unpatch_weights=False)
    assert sum(entry[1] for entry in full._load_list()) == everything


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_model_that_would_gain_too_little_is_handed_on_and_told_its_share(name):
    full = patcher(name)
    same, saving = attach_modulation_cache(full)
    assert same is full and 0 < saving.aside < 0.05 * saving.total
    assert f"{saving.aside / saving.total:.1%} of the weights" in saving.line() and family_of(full.model.diffusion_model).name in saving.line()
    assert not full.object_patches and group.ModulationCache.execute(full).result[0] is full


def test_the_bytes_of_the_table_are_asked_of_the_host_before_it_loads(monkeypatch):
    asked, records = [], []
    load = comfy.model_management.load_models_gpu

    def asks(models, memory_required=0, **more):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", asks)
    for one in (model("flux"), attach_modulation_cache(model("flux"), records.append)[0]):
        sample(one, "flux", steps=6, size=8)
    modules = [dict(model("flux").model.diffusion_model.named_modules())[path] for path in FAMILIES["flux"].modulations(model("flux").model.diffusion_model)]
    largest = max(map(comfy.model_management.module_size, modules))
    wanted, column = records[0].table + 2 * largest, asked[0] / 8       # the host counts in columns of the latent
    assert wanted <= asked[1] - asked[0] <= wanted + column


class Pages:
    """Stands for the GPU's pages under the host's dynamic loading, which wants a GPU: it counts what is staged and what is given back."""

    def __init__(self, size, device):
        self.size, self.freed = size, []

    def alloc(self, size):
        return size

    def prioritize(self):
        pass

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        self.freed.append(size)
        return 0


class Buffer:
    def __init__(self, *args):
        self.size = 0


@pytest.fixture
def dynamic(monkeypatch):
    """A patcher of the host's dynamic class, for a device that no CPU-only torch lacks."""
    monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", Buffer)
    monkeypatch.setattr("comfy_aimdo.model_vbar.ModelVBAR", Pages)
    return comfy.model_patcher.ModelPatcherDynamic(tiny.patcher("flux").model, load_device=torch.device("meta"), offload_device=torch.device("cpu"))


def staged(patcher) -> set[str]:
    return {name for name, module in patcher.model.named_modules() if hasattr(module, "_v")}


def test_dynamic_loading_stages_no_weight_of_a_modulation_and_is_told_the_smaller_size(dynamic):
    assert dynamic.is_dynamic()
    clone, saving = attach_modulation_cache(dynamic)
    assert type(clone) is type(dynamic) and clone.model_size() == dynamic.model_size() - saving.aside
    clone.partially_load(clone.load_device)
    mine = staged(clone)
    assert mine and not any("_mod." in name or "modulation" in name for name in mine)
    dynamic.partially_load(dynamic.load_device)
    assert staged(dynamic) == mine | {name for path in clone.get_attachment(KEY).names for name, layer in layers(original(clone, path), path)}


def test_pages_that_a_clone_without_the_cache_has_filled_are_given_back_once(dynamic):
    clone, _ = attach_modulation_cache(dynamic)
    dynamic.partially_load(dynamic.load_device)
    pages = clone.model.dynamic_vbars[clone.load_device]
    give_pages_back(clone)
    assert pages.freed == [1e32]
    clone.partially_load(clone.load_device)
    give_pages_back(clone)
    assert pages.freed == [1e32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_loading_patches_a_modulation_in_the_type_it_computes_in(dynamic, dtype):
    """As the host does for a layer that it casts on the fly."""
    clone, _ = attach_modulation_cache(dynamic)
    path, key = "diffusion_model.double_blocks.0.img_mod", "diffusion_model.double_blocks.0.img_mod.lin.weight"
    clone.add_patches({key: ("diff", (torch.randn(768, 128, generator=torch.Generator().manual_seed(1)),))}, 0.7)
    vector = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    layer = original(clone, path).lin
    clone.model.current_patcher = clone
    try:
        got = clone.object_patches[path](vector)
    finally:
        clone.model.current_patcher = None
    layer.comfy_cast_weights, layer.weight_function = True, [comfy.model_patcher.LowVramPatch(key, clone.patches)]
    try:
        wanted = original(clone, path)(vector)
    finally:
        del layer.comfy_cast_weights, layer.weight_function
    assert torch.equal(got[0].shift, wanted[0].shift) and torch.equal(got[1].gate, wanted[1].gate)
    assert not torch.equal(got[0].shift, original(clone, path)(vector.float())[0].shift.to(dtype))
