"""Seeded random models of the host's real classes, made in a moment, for tests and timing. Nothing of it is kept.

    patcher("flux", seed=0)             a ModelPatcher, as the stock loader makes it
    write("flux", path, seed=0)         a checkpoint that the stock UNETLoader opens

"Slow time": the fast columns of the first time-embedding layer are zero. A random network otherwise turns through many
radians from one step to the next, each step is an unrelated network, and no cache has anything to predict.
Gates and modulation are alive, so that every block moves its stream.
"""
import json
import math
import zlib
from pathlib import Path

import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from .arch import Z_IMAGE_DECOY, ZImageConfig
from .kind import Kind
from .nodes.text import WIDTH
from .zoo import ZOO

SLOW = 0.72     # share of the time frequencies, counted from the fastest, that is left out
TIME_IN = {     # first layers of time embeddings, by the end of their names, and how many of their columns are time's; 0 is all
    "time_in.in_layer.weight": 0, "t_embedder.in_layer.weight": 0, "t_embedder.mlp.0.weight": 0, "time_embedding.0.weight": 0,
    "timestep_embedder.linear_1.weight": 0, "time_embed.0.weight": 0, "time_embeddings.in_layer.weight": 0, "t_embedder.1.linear_1.weight": 0,
    "time_r_in.in_layer.weight": 0, "tmlp.0.weight": 0, "distilled_guidance_layer.in_proj.weight": 16,
}
MODULATION = ("mod", "adaLN", "time_projection")


def flux(operations, hidden=128, depth=2, depth_single=3, text=16, pooled=16) -> nn.Module:
    return comfy.ldm.flux.model.Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=pooled, context_in_dim=text, hidden_size=hidden, mlp_ratio=4.0,
        num_heads=hidden // 128, depth=depth, depth_single_blocks=depth_single, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=torch.float32, device="cpu", operations=operations)


def flux2(operations, hidden=128, depth=1, depth_single=2, text=16) -> nn.Module:
    return comfy.ldm.flux.model.Flux(
        image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=text, hidden_size=hidden, mlp_ratio=3.0,
        num_heads=hidden // 128, depth=depth, depth_single_blocks=depth_single, axes_dim=[32, 32, 32, 32], theta=2000, patch_size=1,
        qkv_bias=False, guidance_embed=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        default_ref_method="index", ref_index_scale=10.0, dtype=torch.float32, device="cpu", operations=operations)


def z_image(operations, **config) -> nn.Module:
    return comfy.ldm.lumina.model.NextDiT(**config, device="cpu", dtype=torch.float32, operations=operations)


def wan(operations, dim=128, ffn=256, layers=3, text=16) -> nn.Module:
    return comfy.ldm.wan.model.WanModel(
        model_type="t2v", patch_size=(1, 2, 2), in_dim=16, dim=dim, ffn_dim=ffn, text_dim=text, out_dim=16, num_heads=dim // 128,
        num_layers=layers, device="cpu", dtype=torch.float32, operations=operations)


def text_width(config: dict) -> dict[str, str]:
    """Wan's metadata; its text width is the one thing that the host does not read from the weights."""
    return {"config": json.dumps({"transformer": {"text_dim": config.get("text", 16)}})}


def sd15(operations) -> nn.Module:
    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=(1,), transformer_depth=[1],
        transformer_depth_output=[1, 1], transformer_depth_middle=1, num_heads=8, num_head_channels=-1, use_spatial_transformer=True,
        context_dim=768, use_linear_in_transformer=False, adm_in_channels=None, legacy=False, use_temporal_attention=False,
        use_temporal_resblock=False, dtype=torch.float32, device="cpu", operations=operations)


def unet(operations, **config) -> nn.Module:
    return UNetModel(**config, device="cpu", operations=operations)


Z_IMAGE = ZImageConfig(cap_feat_dim=16, n_layers=4, ffn_dim_multiplier=1.0, multiple_of=32).as_dict()

UNET = {     # three resolutions of two blocks each, where SD 1.5 has four and SDXL three
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4),
    "use_spatial_transformer": True, "context_dim": 16, "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False,
    "dtype": torch.float32,
}
SD15_LIKE = {
    **UNET, "transformer_depth": [1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "use_linear_in_transformer": False, "adm_in_channels": None, "num_heads": 8, "num_head_channels": -1,
}
SDXL_LIKE = {
    **UNET, "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2,
    "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 16 + 6 * 256, "num_heads": -1, "num_head_channels": 64,
}
SVD_LIKE = {
    **UNET, "in_channels": 8, "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 3 * 256, "num_heads": -1,
    "num_head_channels": 64, "use_temporal_resblock": True, "use_temporal_attention": True, "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "attn_precision": torch.float32,
}

KINDS = {
    "flux": Kind(flux, {}, channels=16, text=16, pooled=16),
    "flux_13m": Kind(flux, {"hidden": 256, "depth": 3, "depth_single": 6, "text": 64, "pooled": 64}, channels=16, text=64, pooled=64),
    "flux2": Kind(flux2, {}, channels=128, text=16),
    "flux2_words": Kind(flux2, {"hidden": 128, "depth": 1, "depth_single": 2, "text": WIDTH}, channels=128, text=WIDTH),    # reads the fixture text encoder
    "z_image": Kind(z_image, Z_IMAGE, channels=16, text=16, metadata=lambda config: {"config": json.dumps({"transformer": config})}),
    "wan": Kind(wan, {}, channels=16, text=16, frames=1, metadata=text_width),
    "wan_words": Kind(wan, {"text": WIDTH}, channels=16, text=WIDTH, frames=1, metadata=text_width),     # reads the fixture text encoder
    "sd15": Kind(sd15, {}, channels=4, text=768),
    "sd15_like": Kind(config=SD15_LIKE, channels=4, host="SD15"),
    "sdxl_like": Kind(config=SDXL_LIKE, channels=4, pooled=16, host="SDXL"),
    "svd_like": Kind(config=SVD_LIKE, channels=4, host="SVD_img2vid"),     # a batch is a video
    **ZOO,
}

OF_FAMILY = {
    "flux": ("flux", "flux2", "flux_longcat"), "chroma": ("chroma", "chroma_radiance"), "nextdit": ("z_image", "lumina2", "z_image_pixel"),
    "qwen_image": ("qwen_image",), "sd3": ("sd3",), "hidream_i1": ("hidream_i1",), "cosmos_predict2": ("cosmos_predict2", "anima"), "aura": ("aura",),
    "omnigen2": ("omnigen2",), "krea2": ("krea2",),
    "wan": ("wan", "wan_vace", "wan_camera", "wan_s2v", "wan_humo", "wan_animate", "wan_scail", "wan_scail2", "wan_dancer"),
    "hunyuan_video": ("hunyuan_video", "hunyuan_image"), "ltxv": ("ltxv",), "ltxav": ("ltxav",), "kandinsky5": ("kandinsky5",),
    "unet": ("sd15_like", "sdxl_like", "svd_like", "sd15"),
}
UNSUPPORTED = ("wan_causal",)


@torch.no_grad()
def fill_(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor from a generator of its own name, so that neither order nor size of the rest matters."""
    for name, p in net.named_parameters():
        generator = Generator().manual_seed((zlib.crc32(name.encode()) ^ seed * 2654435761) & 0x7FFFFFFF)
        p.copy_(value(name, p.shape, generator))
    return net


def value(name: str, shape: torch.Size, generator: Generator) -> Tensor:
    """What stands at `name`: fp32, where the generator is."""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    learnt = name.endswith("modulation") or "pad_token" in name      # a table or a token, not a matrix
    if len(shape) == 1 and name.endswith(("weight", "scale")):
        return torch.ones_like(noise)
    if len(shape) < 2 or learnt:
        return noise.mul_(0.02)
    noise.mul_(0.5 if any(part in name for part in MODULATION) else 1.0).div_(math.sqrt(noise[0].numel()))
    for columns in (columns or shape[1] for end, columns in TIME_IN.items() if name.endswith(end)):
        half = columns // 2
        slow = (torch.arange(half, device=noise.device) >= SLOW * half).float()
        noise[:, :columns].mul_(torch.cat([slow, slow]) / math.sqrt(1 - SLOW))
    return noise


def weights(name: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict, fp32, and the metadata of a checkpoint."""
    kind = KINDS[name]
    net = fill_(kind.build(comfy.ops.disable_weight_init, **kind.config), seed)
    metadata = kind.metadata(kind.config)
    decoy = {key: torch.zeros(shape) for key, shape in Z_IMAGE_DECOY.items()} if "image_model" in kind.config and metadata else {}
    return net.state_dict() | decoy, metadata


def patcher(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | None = None):
    """A ModelPatcher, made by the host's loader, or by its model class, to run on `device`, where the loader cannot tell the size."""
    kind = KINDS[name]
    if kind.stock:
        tensors, metadata = weights(name, seed)
        return comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": dtype}, metadata=metadata)
    config = getattr(comfy.supported_models, kind.host)(dict(kind.config))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    kind.finish(model.diffusion_model)
    fill_(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device or cpu, offload_device=cpu)


def write(name: str, path: Path | str, seed: int = 0) -> None:
    """An fp16 checkpoint."""
    if not KINDS[name].stock:
        raise ValueError(f"the stock loader cannot tell the size of a tiny {name}; use patcher('{name}')")
    tensors, metadata = weights(name, seed)
    save(tensors, path, metadata)


def write_wan_vae(path: Path | str, seed: int = 0, dim: int = 8) -> None:
    """An fp16 Wan 2.1 VAE that the stock VAELoader opens: 8 pixels and 4 frames to a latent one, as it has them."""
    vae = comfy.ldm.wan.vae.WanVAE(
        dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0)
    save(fill_(vae, seed).state_dict(), path, {})


def save(tensors: dict[str, Tensor], path: Path | str, metadata: dict[str, str]) -> None:
    save_file({key: tensor.detach().half().contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt", **metadata})


def conditioning(name: str, seed: int = 1, tokens: int = 7, **more) -> list:
    """A random prompt, as the host's CONDITIONING."""
    kind, generator = KINDS[name], Generator().manual_seed(seed)
    text = torch.randn(1, tokens, kind.text, generator=generator)
    pooled = {"pooled_output": torch.randn(1, kind.pooled, generator=generator)} if kind.pooled else {}
    return [[text, {**pooled, **kind.extra(generator), **more}]]


def noise(name: str, seed: int = 2, size: int | tuple[int, int] = 8, batch: int = 1) -> Tensor:
    return KINDS[name].noise(KINDS[name].latent(size, batch), Generator().manual_seed(seed))
