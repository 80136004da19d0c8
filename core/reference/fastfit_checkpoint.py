"""A FastFit checkpoint as a MODEL: the `unet` of its diffusers folder, recognised, renamed to the host's keys and loaded as the host loads one.

Blocks and widths are read from the tensors, so a UNet of any size will do. Safetensors only: opening a pickle may run code.
"""
import re
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..knob import shown
from .fastfit_unet import IN_CHANNELS, LATENT_CHANNELS, FastFitConfig, FastFitUNet
from .folders import SAFE
from .weights import kind

EXPECTED = "choose unet/diffusion_pytorch_model.safetensors of FastFit-MR-1024 or FastFit-SR-1024"
GROUPS = 32         # of every norm over channels
NUMBER = re.compile(r"\d{1,3}")
OWN = ("condition_conv_in.weight", "condition_conv_in.bias", "class_embedding.weight")    # named alike on both sides
WEIGHTS = {"default": {}, "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn}, "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8": True},
           "fp8_e5m2": {"dtype": torch.float8_e5m2}}


class WrongFile(ValueError):
    """A file that is no FastFit UNet."""


class Shapes(comfy.ops.disable_weight_init):
    """The host's operations without its loading: on the meta device they have shapes and nothing else."""

    Linear, Conv2d, GroupNorm, LayerNorm, Embedding = nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding


def load_fastfit(path: Path | str, weights: str = "default", disable_dynamic: bool = False):
    """A ModelPatcher, as the host's own loaders make it."""
    if weights not in WEIGHTS:
        raise ValueError(f"weight_dtype is '{shown(weights)}'; choose one of {', '.join(WEIGHTS)}")
    path = Path(path)
    tensors = read(path)
    config = unet_config(tensors, path.name)
    patcher = build(renamed(tensors, config, path.name), config, disable_dynamic=disable_dynamic, **WEIGHTS[weights])
    patcher.cached_patcher_init = (load_fastfit, (path, weights))
    return patcher


def read(path: Path) -> dict[str, Tensor]:
    if not path.name.lower().endswith(SAFE):
        raise WrongFile(f"{path.name} is no safetensors file, and others may run code when they are opened; {EXPECTED}")
    try:
        with safe_open(path, framework="pt"):    # reads the header and compares it with the size of the file
            pass
    except SafetensorError as error:
        raise WrongFile(f"{path.name} is not a whole safetensors file ({error}); download it again") from error
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def unet_config(tensors: Mapping[str, Tensor], name: str) -> dict:
    """Arguments of FastFitUNet; a WrongFile says what the tensors are instead."""
    if "conv_in.weight" not in tensors:
        raise WrongFile(f"{name} has no conv_in.weight, which a UNet of a diffusers folder has, but keys such as {next(iter(tensors), 'none')}; {EXPECTED}")
    if any(".attn2." in key for key in tensors):
        raise WrongFile(f"{name} is a UNet with cross-attention, as SD 1.5 has it, and FastFit's has none; {EXPECTED}")
    if absent := [key for key in OWN if key not in tensors]:
        raise WrongFile(f"{name} has no {absent[0]}, which FastFit's UNet has; {EXPECTED}")
    check_types(tensors, name)
    for key, dims in (("conv_in.weight", 4), ("class_embedding.weight", 2)):
        if tensors[key].ndim != dims or 0 in tensors[key].shape:
            raise WrongFile(f"{name} has {key} of shape {list(tensors[key].shape)} where {dims} dimensions, none of them 0, belong; download it again")
    width, channels = tensors["conv_in.weight"].shape[:2]
    if width % GROUPS:
        raise WrongFile(f"{name} has conv_in.weight of {width} rows, which {GROUPS} groups of a norm cannot share; {EXPECTED}")
    if channels != IN_CHANNELS:
        raise WrongFile(f"{name} takes {channels} channels and FastFit {IN_CHANNELS}: noise, mask and masked person; {EXPECTED}")

    def blocks(prefix: str) -> list[str]:
        numbers = {key[len(prefix):].split(".")[0]: key for key in tensors if key.startswith(prefix)}
        if wrong := [key for number, key in numbers.items() if not NUMBER.fullmatch(number)]:
            raise WrongFile(f"{name} has the key {shown(wrong[0])}, which FastFit's UNet does not have; {EXPECTED}")
        return [f"{prefix}{number}." for number in sorted(numbers, key=int)]

    def depths(side: str) -> list[list[int]]:
        return [[len(blocks(f"{block}attentions.{i}.transformer_blocks.")) for i in range(len(blocks(f"{block}resnets.")))] for block in blocks(side)]

    down, up = depths("down_blocks."), depths("up_blocks.")
    first = [f"down_blocks.{level}.resnets.0.conv1.weight" for level in range(len(down))]
    if absent := [key for key in (*first, "mid_block.attentions.0.proj_in.weight") if key not in tensors]:
        raise WrongFile(f"{name} has no {absent[0]}; the file is not whole, download it again")
    if wrong := [key for key in first if tensors[key].ndim != 4 or tensors[key].shape[0] < width or tensors[key].shape[0] % width]:
        raise WrongFile(f"{name} has {wrong[0]} of shape {list(tensors[wrong[0]].shape)}, whose rows are no multiple of the {width} of conv_in; {EXPECTED}")
    return {
        **FastFitConfig.unet_extra_config, "image_size": 32, "in_channels": channels, "out_channels": LATENT_CHANNELS, "model_channels": width,
        "channel_mult": [tensors[key].shape[0] // width for key in first], "num_res_blocks": list(map(len, down)),
        "transformer_depth": sum(down, []), "transformer_depth_output": sum(up, [])[::-1],
        "transformer_depth_middle": len(blocks("mid_block.attentions.0.transformer_blocks.")),
        "use_linear_in_transformer": tensors["mid_block.attentions.0.proj_in.weight"].ndim == 2,
        "num_class_embeds": tensors["class_embedding.weight"].shape[0], "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
        "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False,
        "context_dim": 768,     # of the text that samplers hand over and nothing reads
    }


def check_types(tensors: Mapping[str, Tensor], name: str) -> None:
    if wrong := [key for key, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise WrongFile(f"{name} has {shown(wrong[0])} of type {kind(tensors[wrong[0]].dtype)} where weights are of floating point; {EXPECTED}")


def renamed(tensors: Mapping[str, Tensor], config: dict, name: str) -> dict[str, Tensor]:
    """By the host's keys, every one there and of the right shape, and no other."""
    wanted = {key: tensor.shape for key, tensor in FastFitUNet(**config, device="meta", operations=Shapes).state_dict().items()}
    names = {theirs: ours for theirs, ours in comfy.utils.unet_to_diffusers(config).items() if ours in wanted} | {key: key for key in OWN}
    if unknown := [key for key in tensors if key not in names]:
        raise WrongFile(f"{name} has the key {unknown[0]}, which FastFit's UNet does not have; {EXPECTED}")
    found = {names[key]: tensor for key, tensor in tensors.items()}
    theirs = {ours: key for key, ours in names.items()}
    for key, shape in wanted.items():
        if key not in found:
            raise WrongFile(f"{name} has no {theirs.get(key, key)}; the file is not whole, download it again")
        if found[key].shape != shape:
            raise WrongFile(f"{name} has {theirs[key]} of shape {list(found[key].shape)} where its other layers ask for {list(shape)}; {EXPECTED}")
    return found


def build(tensors: dict[str, Tensor], config: dict, dtype: torch.dtype | None = None, fp8: bool = False, disable_dynamic: bool = False):
    """A ModelPatcher from the host's keys. dtype: of the weights; without one, what the host takes for such a model on this machine."""
    management, facts = comfy.model_management, FastFitConfig(config)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = list(facts.supported_inference_dtypes)
    dtype = dtype or management.unet_dtype(model_params=comfy.utils.calculate_parameters(tensors), supported_dtypes=supported,
                                           weight_dtype=comfy.utils.weight_dtype(tensors))
    facts.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    facts.optimizations["fp8"] = fp8
    model = facts.get_model(tensors)
    make = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = make(model, load_device=device, offload_device=offload)
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    return patcher
