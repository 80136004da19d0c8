"""A tiny FLUX.2 of two heads, and template files for it with random weights, spelled as the published ones are."""
import math
from pathlib import Path

import comfy.ops
import comfy.sd
import torch
from safetensors.torch import save_file

from pack.core.reference.templates import template_of
from pack.core.reference.templates.file import opened
from testbed import tiny

WIDTH, DOUBLES, SINGLES = 256, 2, 3
BLOCKS = [f"double_{i}" for i in range(DOUBLES)] + [f"single_{i}" for i in range(SINGLES)]

# The host's names, and the template's. Longer ones first.
TEMPLATE_NAMES = [
    ("img_attn.norm.query_norm", "img_norm_q"), ("img_attn.norm.key_norm", "img_norm_k"), ("txt_attn.norm.query_norm", "txt_norm_q"),
    ("txt_attn.norm.key_norm", "txt_norm_k"), ("norm.query_norm", "norm_q"), ("norm.key_norm", "norm_k"), ("img_attn.qkv", "img_to_qkv"),
    ("txt_attn.qkv", "txt_to_qkv"), ("img_attn.proj", "img_to_out"), ("txt_attn.proj", "txt_to_out"), ("img_mlp.0", "img_ff.linear_in"),
    ("img_mlp.2", "img_ff.linear_out"), ("txt_mlp.0", "txt_ff.linear_in"), ("txt_mlp.2", "txt_ff.linear_out"), ("linear1", "to_qkv_mlp_proj"),
    ("linear2", "to_out"), ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks"), (".lin.", ".linear."),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"), ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("img_in", "img_embedder"), ("txt_in", "txt_embedder"),
]


def network_weights(seed: int = 0, **size) -> dict[str, torch.Tensor]:
    net = tiny.flux2(comfy.ops.disable_weight_init, **{"hidden": WIDTH, "depth": DOUBLES, "depth_single": SINGLES, **size})
    return tiny.fill_(net, seed).state_dict()


def base(seed: int = 0, **size):
    return comfy.sd.load_diffusion_model_state_dict(network_weights(seed, **size), model_options={"dtype": torch.float32})


def random(*shape, generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def scalar_weights(seed: int = 1, values: int = 1, tokens: int = 6, width: int = WIDTH, blocks=BLOCKS) -> dict[str, torch.Tensor]:
    made, generator = {}, torch.Generator().manual_seed(seed)
    for part in "kv":
        for block in blocks:
            name = f"proj_{part}.{block}"
            made[f"{name}.prefer_value_embedder.0.weight"] = random(width, 256 * values, generator=generator) / 8
            made[f"{name}.prefer_value_embedder.0.bias"] = random(width, generator=generator)
            made[f"{name}.prefer_value_embedder.2.weight"] = random(width, width, generator=generator) / math.sqrt(width) * 3
            made[f"{name}.prefer_value_embedder.2.bias"] = random(width, generator=generator)
            made[f"{name}.positional_embedding"] = random(tokens, width, generator=generator)
    return made


def image_weights(seed: int = 21, **size) -> dict[str, torch.Tensor]:
    made = {}
    for key, tensor in network_weights(seed, **size).items():
        if key.startswith("final_layer"):
            continue
        for ours, theirs in TEMPLATE_NAMES:
            key = key.replace(ours, theirs)
        made[key] = tensor
    return made


def lora_weights(seed: int = 3, layers=("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"), count: int = 0, rank: int = 2,
                 width: int = WIDTH) -> dict[str, torch.Tensor]:
    """count: of a bank, stacked; 0 is a single LoRA."""
    made, generator, stack = {}, torch.Generator().manual_seed(seed), (count,) if count else ()
    for layer in layers:
        out = width * 9 if layer.endswith("mlp_proj") else width
        made[f"{layer}.lora_A.default.weight"] = random(*stack, rank, width, generator=generator) / math.sqrt(width)
        made[f"{layer}.lora_B.default.weight"] = random(*stack, out, rank, generator=generator)
    return made


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "template") -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def template(folder: Path, tensors: dict[str, torch.Tensor], name: str = "template", **options):
    return template_of(opened(write(folder, tensors, name), f"{name}.safetensors"), **options)
