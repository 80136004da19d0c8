"""A model as one safetensors file in the host's own formats, which the stock loader opens without this pack.

Layers that are packed become int8, and the header says which they were.
"""
from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from . import transcode
from .blocks import rotation_group
from .layer import Layer
from .loader import METADATA, TYPES
from .packed_ops import is_packed
from .svdquant.header import SAID

NETWORK = "diffusion_model."
TRANSCODED = "reprise.transcoded"
WHOLE = ("bias", "input_scale", "pre_quant_scale")      # beside a quantized weight, and no part of it


def save(patcher, path: Path) -> dict[str, str]:
    """Writes the model with its LoRAs, whole or not at all. Returns the layers that were turned into int8, and what they were."""
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    sd, turned = state_dict(patcher)
    metadata = {"format": "pt", **(patcher.get_attachment(METADATA) or {})}
    for said in ("_quantization_metadata", *SAID):      # every layer carries its own mark
        metadata.pop(said, None)
    if turned:
        metadata[TRANSCODED] = json.dumps(turned)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(sd, partial, metadata=metadata)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path.name}' could not be written ({error}); see that the disk has room and the folder can be written to") from error
    finally:
        partial.unlink(missing_ok=True)
    return turned


def state_dict(patcher) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in the host's formats, and {packed layer: its format}.

    The host has a function for this, which cannot make parameters of int8 weights that are not on the GPU.
    """
    network, sd, turned = patcher.model.diffusion_model, {}, {}
    modules, stored = dict(network.named_modules()), network.state_dict()
    bar = comfy.utils.ProgressBar(max(1, len(stored)))
    for done, (key, tensor) in enumerate(stored.items(), 1):
        name, _, part = key.rpartition(".")
        module = modules[name]
        if not isinstance(getattr(module, "weight", None), QuantizedTensor) or part in WHOLE:
            sd[key] = patched(patcher, key, module, tensor)
        elif part == "weight":
            if was := getattr(module, "stored_as", None):
                turned[name] = was
            sd |= {name + end: piece for end, piece in quantized(patched(patcher, key, module, module.weight), name, stored).items()}
        bar.update_absolute(done)
    types = patcher.get_attachment(TYPES) or {}
    return {key: as_it_came(plain(tensor), types.get(key)) for key, tensor in sd.items()}, turned


def patched(patcher, key: str, module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor with its LoRAs, whether the host has put them on already or not."""
    if NETWORK + key not in patcher.patches or getattr(module, "comfy_patched_weights", False):
        return tensor
    return patcher.patch_weight_to_device(NETWORK + key, device_to=tensor.device, return_weight=True)


def quantized(weight: Tensor, name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer under the host's suffixes; one that the host does not know as int8."""
    if hasattr(weight.layout_cls, "int8"):      # a layout of ours that computes as int8
        codes, scales = weight.layout_cls.int8(weight._qdata, weight._params)
        return {".weight": codes, ".weight_scale": scales, ".comfy_quant": transcode.int8_mark(rotation_group(weight.shape[1]))}
    if is_packed(weight):
        whole = weight.detach().to("cpu").dequantize()
        layer = Layer(name=name, format=weight._layout_cls, shape=tuple(whole.shape), unpack=lambda start, stop: whole[start:stop], nbytes=0)
        return transcode.int8(layer)
    mark = stored[f"{name}.comfy_quant"]
    if weight._layout_cls == "TensorWiseINT8Layout":        # perhaps what a LoRA made of a packed layer
        mark = transcode.int8_mark(weight._params.convrot_groupsize if weight._params.convrot else 0)
    return weight.state_dict(".weight") | {".comfy_quant": mark}


def as_it_came(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the type that the file had, where all values fit into it: the host holds tensors in the type that it computes in, fp32 on a CPU."""
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point() or dtype.itemsize > tensor.dtype.itemsize:
        return tensor
    kept = tensor.to(dtype)
    return kept if torch.equal(kept.to(tensor.dtype), tensor) else tensor


def plain(tensor: Tensor) -> Tensor:
    """On the CPU and contiguous, what a file can hold. `.to` comes first: the host patches what it hands out then."""
    return tensor.to("cpu").detach().contiguous()
