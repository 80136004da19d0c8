"""Tiny members of every model family that the host's own model classes build, as its loader cannot tell their size.

    ZOO[name] = Kind(host=<class of comfy.supported_models>, config=<what the host's loader would have found out>, ...)
"""
import comfy.nested_tensor
import torch
from torch import Tensor, nn

from .kind import Kind

WIDTH, TEXT, POOLED = 64, 16, 16
FLUX = {
    "hidden_size": WIDTH, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
}
CHROMA = FLUX | {
    "context_in_dim": TEXT, "in_dim": 64, "out_dim": WIDTH, "hidden_dim": 32, "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None, "patch_size": 2,
}
HUNYUAN = FLUX | {
    "image_model": "hunyuan_video", "context_in_dim": TEXT, "guidance_embed": False, "byt5": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}
WAN = {
    "image_model": "wan2.1", "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16, "dim": WIDTH, "ffn_dim": 128, "text_dim": TEXT, "num_heads": 2,
    "num_layers": 6,
}
LTX = {"in_channels": 16, "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": TEXT, "cross_attention_dim": WIDTH, "num_layers": 4}
COSMOS = {
    "max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "concat_padding_mask": True, "model_channels": WIDTH, "num_blocks": 4, "num_heads": 2, "crossattn_emb_channels": TEXT, "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 16,
}
NEXTDIT = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": WIDTH, "cap_feat_dim": TEXT, "n_layers": 4, "n_refiner_layers": 1, "qk_norm": True,
    "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64], "multiple_of": 32, "ffn_dim_multiplier": 1.0, "time_scale": 1000.0,
}


def mask(generator) -> dict:
    return {"attention_mask": torch.ones(1, 7, dtype=torch.long)}


def wan(model_type: str, **config) -> dict:
    return WAN | {"model_type": model_type} | config


def normal(name: str, *shape: int):
    """A condition of random numbers."""
    return lambda generator: {name: torch.randn(shape, generator=generator)}


class Vision:
    """What a vision encoder gives: four tokens."""

    def __init__(self, generator):
        self.penultimate_hidden_states = torch.randn(1, 4, 1280, generator=generator)


def vision(generator) -> dict:
    return {"clip_vision_output": Vision(generator)}


def without(*names: str):
    """Large parts that nothing here calls are left out."""
    def finish(network: nn.Module) -> None:
        for name in names:
            delattr(network, name)
    return finish


def moving_face(network: nn.Module) -> None:
    """Fixed motion tokens in place of the encoders of a face video, which are large."""
    without("motion_encoder", "face_encoder")(network)
    motion = torch.randn(1, 1, 5, network.dim, generator=torch.Generator().manual_seed(9))
    network.after_patch_embedding = lambda x, pose, face: (x, motion.to(x).repeat(x.shape[0], x.shape[2], 1, 1))


def sound(size: tuple[int, ...], generator) -> Tensor:
    """A video latent and an audio latent, as one."""
    return comfy.nested_tensor.NestedTensor([torch.randn(size, generator=generator), torch.randn(size[0], 8, 6, 16, generator=generator)])


ZOO = {
    "flux_longcat": Kind(
        host="LongCatImage", config=FLUX | {
            "image_model": "longcat_image", "in_channels": 16, "out_channels": 16, "vec_in_dim": None, "context_in_dim": TEXT, "guidance_embed": False,
            "patch_size": 2, "txt_ids_dims": [1, 2]},
        channels=16, text=TEXT),
    "chroma": Kind(host="Chroma", config=CHROMA | {"image_model": "chroma", "in_channels": 64, "out_channels": 64}, channels=16, text=TEXT),
    "chroma_radiance": Kind(
        host="ChromaRadiance", config=CHROMA | {
            "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1,
            "nerf_max_freqs": 2, "nerf_tile_size": 0, "nerf_final_head_type": "linear", "nerf_embedder_dtype": None, "use_x0": False,
            "use_sequential_txt_ids": False},
        channels=3, text=TEXT),
    "lumina2": Kind(host="Lumina2", config=NEXTDIT, channels=16, text=TEXT, extra=mask),
    "z_image_pixel": Kind(
        host="ZImagePixelSpace", config=NEXTDIT | {
            "z_image_modulation": True, "in_channels": 3, "dim": 256, "axes_dims": [32, 48, 48], "pad_tokens_multiple": 8, "decoder_hidden_size": 16,
            "decoder_num_res_blocks": 1, "decoder_max_freqs": 2},
        channels=3, text=TEXT, extra=mask),
    "qwen_image": Kind(
        host="QwenImage", config={
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 128, "joint_attention_dim": 16},
        channels=16, text=TEXT, frames=1),
    "sd3": Kind(
        host="SD3", config={
            "in_channels": 16, "pos_embed_scaling_factor": None, "input_size": None, "num_patches": None, "pos_embed_max_size": None, "patch_size": 2,
            "depth": 3, "adm_in_channels": POOLED, "qk_norm": "rms",
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 192}}},
        channels=16, text=TEXT, pooled=POOLED),
    "hidream_i1": Kind(
        host="HiDream", config={
            "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32,
            "num_attention_heads": 2, "caption_channels": [TEXT, TEXT], "text_emb_dim": POOLED, "num_routed_experts": 2, "num_activated_experts": 1,
            "axes_dims_rope": (8, 12, 12), "max_resolution": (16, 16), "llama_layers": [0, 1, 2, 2, 1]},
        channels=16, text=TEXT, pooled=POOLED, extra=normal("conditioning_llama3", 1, 3, 5, TEXT)),
    "cosmos_predict2": Kind(host="CosmosT2IPredict2", config=COSMOS | {"image_model": "cosmos_predict2"}, channels=16, text=TEXT, frames=1),
    "anima": Kind(host="Anima", config=COSMOS | {"image_model": "anima"}, channels=16, text=TEXT, frames=1, finish=without("llm_adapter")),
    "aura": Kind(
        host="AuraFlow", config={
            "cond_seq_dim": TEXT, "dim": WIDTH, "n_layers": 5, "n_double_layers": 2, "n_heads": 2, "global_conddim": WIDTH, "max_seq": 64},
        channels=4, text=TEXT),
    "omnigen2": Kind(
        host="Omnigen2", config={
            "image_model": "omnigen2", "hidden_size": WIDTH, "num_layers": 4, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2,
            "multiple_of": 32, "axes_dim_rope": (8, 12, 12), "axes_lens": (64, 64, 64), "text_feat_dim": TEXT, "timestep_scale": 1000.0},
        channels=16, text=TEXT, extra=mask),
    "krea2": Kind(
        host="Krea2", config={
            "image_model": "krea2", "features": WIDTH, "txtdim": 8, "heads": 2, "kvheads": 2, "multiplier": 2, "layers": 4, "txtlayers": 2, "txtheads": 2,
            "txtkvheads": 2},
        channels=16, text=2 * 8, frames=1),
    "wan_vace": Kind(host="WAN21_Vace", config=wan("vace", vace_layers=3, vace_in_dim=96), channels=16, text=TEXT, frames=1),
    "wan_camera": Kind(
        host="WAN22_Camera", config=wan("camera_2.2", in_dim=32), channels=16, text=TEXT, frames=1, extra=normal("camera_conditions", 1, 24, 1, 64, 64)),
    "wan_s2v": Kind(
        host="WAN22_S2V", config=wan("s2v", audio_dim=8, audio_inject_layers=[0, 2, 4]), channels=16, text=TEXT, frames=1,
        extra=normal("audio_embed", 1, 25, 8, 4)),
    "wan_humo": Kind(host="WAN21_HuMo", config=wan("humo"), channels=16, text=TEXT, frames=1, finish=without("audio_proj")),
    "wan_animate": Kind(
        host="WAN22_Animate", config=wan("animate", num_layers=10), channels=16, text=TEXT, frames=1, extra=vision, finish=moving_face),
    "wan_scail": Kind(
        host="WAN21_SCAIL", config=wan("scail", in_dim=20), channels=16, text=TEXT, frames=1,
        extra=lambda generator: vision(generator) | normal("pose_video_latent", 1, 16, 1, 8, 8)(generator)),
    "wan_scail2": Kind(host="WAN21_SCAIL2", config=wan("scail2", in_dim=20), channels=16, text=TEXT, frames=1, extra=vision),
    "wan_dancer": Kind(
        host="WAN22_WanDancer", config=wan(
            "wandancer", in_dim=36, audio_inject_layers=[0, 3], music_dim=32, music_heads=2, music_feature_dim=8, music_latent_dim=32),
        channels=16, text=TEXT, frames=1, extra=lambda generator: vision(generator) | normal("audio_embed", 1, 8, 8)(generator)),
    "wan_causal": Kind(host="WAN21_CausalAR_T2V", config=wan("t2v"), channels=16, text=TEXT, frames=1),
    "hunyuan_video": Kind(
        host="HunyuanVideo", config=HUNYUAN | {"in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "patch_size": [1, 2, 2], "meanflow": False},
        channels=16, text=TEXT, pooled=POOLED, frames=1),
    "hunyuan_image": Kind(
        host="HunyuanImage21", config=HUNYUAN | {
            "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "patch_size": [1, 1], "meanflow": True, "axes_dim": [16, 16]},
        channels=64, text=TEXT),
    "ltxv": Kind(host="LTXV", config=LTX | {"image_model": "ltxv"}, channels=16, text=TEXT, frames=2, extra=mask),
    "ltxav": Kind(
        host="LTXAV", config=LTX | {
            "image_model": "ltxav", "audio_in_channels": 128, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16, "audio_num_attention_heads": 2},
        channels=16, text=2 * TEXT, frames=2, extra=mask, noise=sound,
        finish=without("audio_embeddings_connector", "video_embeddings_connector")),
    "kandinsky5": Kind(
        host="Kandinsky5", config={
            "image_model": "kandinsky5", "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": TEXT, "in_text_dim2": POOLED, "time_dim": 32,
            "model_dim": WIDTH, "ff_dim": 128, "visual_embed_dim": 132, "patch_size": (1, 2, 2), "num_text_blocks": 1, "num_visual_blocks": 4,
            "axes_dims": (8, 12, 12)},
        channels=16, text=TEXT, pooled=POOLED, frames=1),
}
