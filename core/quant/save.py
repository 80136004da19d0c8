"""A model as one safetensors file in the host's own formats, which the stock loader opens without this pack.

Layers that are packed become int8, and the header says which they were.
"""
from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from safetensors.torch import save_file
from torch import Tensor, nn

from . import transcode
from .layer import Layer
from .loader import METADATA

NETWORK = "diffusion_model."
TRANSCODED = "reprise.transcoded"
HOST = {algo["comfy_tensor_layout"] for algo in QUANT_ALGOS.values()}


def save(patcher, path: Path) -> dict[str, str]:
    """Writes the model with its LoRAs, whole or not at all. Returns the layers that were turned into int8, and what they were."""
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    sd, turned = state_dict(patcher)
    metadata = {"format": "pt", **(patcher.get_attachment(METADATA) or {})}
    metadata.pop("_quantization_metadata", None)    # every layer carries its own mark
    if turned:
        metadata[TRANSCODED] = json.dumps(turned)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(sd, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return turned


def state_dict(patcher) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The host's tensors for saving, packed layers as int8; and {packed layer: its format}."""
    network = patcher.model.diffusion_model
    packed = {name: module for name, module in network.named_modules() if is_packed(module)}
    kept = patcher.model_state_dict_for_saving(network, NETWORK)
    sd = {key: tensor for key, tensor in kept.items() if owner(key, packed) is None}
    bar = comfy.utils.ProgressBar(max(1, len(packed)))
    for done, (name, module) in enumerate(packed.items(), 1):
        weight = patched(patcher, name, module)
        parts = as_int8(name, weight) if isinstance(weight, QuantizedTensor) and weight._layout_cls not in HOST else stored(weight)
        sd |= {name + suffix: tensor for suffix, tensor in parts.items()}
        if module.bias is not None:
            sd[f"{name}.bias"] = kept[f"{name}.bias"]
        bar.update_absolute(done)
    return {key: plain(tensor) for key, tensor in sd.items()}, {name: stored_as(module.weight) for name, module in packed.items()}


def is_packed(module: nn.Module) -> bool:
    """Stored as something that the host's loader does not know. A LoRA that is on a packed layer has made it the host's int8 for now."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, QuantizedTensor) and weight._layout_cls not in HOST


def stored_as(weight: QuantizedTensor) -> str:
    """The format of a packed layer: "Q4_K", or the name of its layout."""
    return getattr(weight._params, "type", None) or weight._layout_cls


def owner(key: str, names) -> str | None:
    name = key.rpartition(".")[0]
    return name if name in names else None


def patched(patcher, name: str, module: nn.Module) -> Tensor:
    """The weight with its LoRAs, whether the host has put them on already or not."""
    key = f"{NETWORK}{name}.weight"
    if key not in patcher.patches or getattr(module, "comfy_patched_weights", False):
        return module.weight
    return patcher.patch_weight_to_device(key, device_to=module.weight.device, return_weight=True)


def as_int8(name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    whole = weight.detach().to("cpu").dequantize()
    layer = Layer(name=name, format=weight._layout_cls, shape=tuple(whole.shape), unpack=lambda start, stop: whole[start:stop], nbytes=0)
    return transcode.int8(layer)


def stored(weight: Tensor) -> dict[str, Tensor]:
    """A layer that a LoRA turned into the host's int8."""
    params = weight._params
    turned = {"convrot": True, "convrot_groupsize": params.convrot_groupsize} if params.convrot else {}
    return {f".weight{suffix}": tensor for suffix, tensor in weight.state_dict().items()} | {
        ".comfy_quant": transcode.marker(format="int8_tensorwise", **turned)}


def plain(tensor: Tensor) -> Tensor:
    """On the CPU and contiguous, what a file can hold. `.to` comes first: the host patches what it hands out then."""
    return tensor.to("cpu").detach().contiguous()
