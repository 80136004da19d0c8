"""The trained models as files in every format of safetensors, written without the readers of the pack.

For tests and benchmarks, and for the demo of workflows whose files are quantized.
"""
import json
from pathlib import Path

import comfy_kitchen as ck
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arch import Z_IMAGE_DECOY

MODELS = Path(__file__).resolve().parent / "models"
KEPT = ("mod", "embed", "_in.", "img_in", "txt_in", "final_layer", "adaLN", *Z_IMAGE_DECOY)     # layers that makers of files leave alone


def read(model: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A trained model at full precision: its state dict, fp16, and the metadata."""
    with safe_open(MODELS / model, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})      # noqa: SIM118


def linear(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2 and not any(part in key for part in KEPT)


def hadamard(size: int) -> np.ndarray:
    """The regular Hadamard matrix of a power of four, orthogonal: an entry is -1 for an odd number of base-4 digits i + j = 3."""
    at = np.arange(size)
    signs = np.ones((size, size))
    while size > 1:
        signs *= np.where((at[:, None] % 4) + (at[None, :] % 4) == 3, -1.0, 1.0)
        at, size = at // 4, size // 4
    return signs / np.sqrt(len(at))


def plain(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {".weight": weight.to(dtype)}


def mark(**conf) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(conf).encode()), dtype=torch.uint8)


def scaled_fp8(weight: Tensor, spelling: str, dtype=torch.float8_e4m3fn) -> dict[str, Tensor]:
    scale = weight.float().abs().max() / torch.finfo(dtype).max
    codes = (weight.float() / scale).to(dtype)
    if spelling == "old":
        return {".weight": codes, ".scale_weight": scale}
    return {".weight": codes, ".weight_scale": scale, ".comfy_quant": mark(format=str(dtype).removeprefix("torch."))}


def int8(weight: Tensor, group: int | None) -> dict[str, Tensor]:
    """The host's int8, a scale for each row; with `group` rotated, where the layer is wide enough."""
    values = weight.double().numpy()
    group = group if group and values.shape[1] % group == 0 else None
    if group:
        values = (values.reshape(len(values), -1, group) @ hadamard(group).T).reshape(values.shape)
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    conf = {"convrot": True, "convrot_groupsize": group} if group else {}
    codes = np.clip(np.rint(values / np.maximum(scale, 1e-30)), -127, 127).astype(np.int8)
    return {".weight": torch.from_numpy(codes), ".weight_scale": torch.from_numpy(scale).float(), ".comfy_quant": mark(format="int8_tensorwise", **conf)}


def by_kitchen(weight: Tensor, layout: str, form: str) -> dict[str, Tensor]:
    """nvfp4 and mxfp8, by the package that defines them."""
    codes, params = ck.tensor.get_layout_class(layout).quantize(weight.float())
    if form == "nvfp4":
        return {".weight": codes, ".weight_scale": params.block_scale, ".weight_scale_2": params.scale, ".comfy_quant": mark(format=form)}
    return {".weight": codes, ".weight_scale": params.scale.view(torch.uint8), ".comfy_quant": mark(format=form)}


WRITERS = {     # format as the loader tells it -> what one layer becomes
    "bf16": lambda weight: plain(weight, torch.bfloat16),
    "fp16": lambda weight: plain(weight, torch.float16),
    "fp32": lambda weight: plain(weight, torch.float32),
    "float8_e4m3fn": lambda weight: plain(weight, torch.float8_e4m3fn),
    "float8_e5m2": lambda weight: plain(weight, torch.float8_e5m2),
    "float8_e4m3fn scaled": lambda weight: scaled_fp8(weight, "new"),
    "float8_e4m3fn scaled, old spelling": lambda weight: scaled_fp8(weight, "old"),
    "float8_e5m2 scaled": lambda weight: scaled_fp8(weight, "new", torch.float8_e5m2),
    "int8_tensorwise": lambda weight: int8(weight, None),
    "int8_tensorwise, rotated": lambda weight: int8(weight, 64),
    "nvfp4": lambda weight: by_kitchen(weight, "TensorCoreNVFP4Layout", "nvfp4"),
    "mxfp8": lambda weight: by_kitchen(weight, "TensorCoreMXFP8Layout", "mxfp8"),
}


def write(model: str, form: str, path: Path, in_header: bool = False) -> Path:
    """The trained model in a format. `in_header`: the layers' marks stand in the metadata, as in many of ComfyUI's files."""
    tensors, metadata = read(model)
    made = {key: tensor for key, tensor in tensors.items() if not linear(key, tensor)}
    for key, tensor in tensors.items():
        if linear(key, tensor):
            made |= {key.removesuffix(".weight") + end: part for end, part in WRITERS[form](tensor).items()}
    if form.endswith("old spelling"):
        made["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    if in_header:
        marks = {key.removesuffix(".comfy_quant"): json.loads(bytes(made.pop(key).numpy())) for key in [k for k in made if k.endswith(".comfy_quant")]}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": marks})
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, path, metadata=metadata)
    return path


def write_gguf(model: str, type: str, path: Path) -> Path:
    """The trained model with its linear layers as GGUF blocks of a type."""
    from . import gguf_files  # of a package that ComfyUI does not bring

    tensors, metadata = read(model)
    made = {key: (tensor.float().numpy(), type) if linear(key, tensor) else tensor.numpy() for key, tensor in tensors.items()}
    told = [("add_string", key, value) for key, value in metadata.items() if key != "format"]
    return gguf_files.write(path, made, "lumina2" if "config" in metadata else "flux", told)


def write_svdquant(model: str, path: Path, kind: str = "int4") -> Path:
    """A trained FLUX as a file of nunchaku; activations are taken to be alike in all channels."""
    from . import nunchaku_files

    tensors, _ = read(model)
    most = {key.removesuffix(".weight"): torch.ones(tensor.shape[1]) for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 2}
    file = nunchaku_files.flux(tensors, most, kind=kind)
    save_file({key: tensor.contiguous() for key, tensor in file.tensors.items()}, path, metadata=file.metadata)
    return path
