"""Text encoders from GGUF files, as an ordinary CLIP. The blocks stay packed; products are those of the decoded weights."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.sd
import comfy.utils
import torch

from .files import BadFile, WeightFile, open_file, whole_numbers
from .formats import layers_of
from .gguf_file import expect_architecture
from .packed_ops import packed_ops
from .text_names import KNOWN, names_of, renamed

TYPES = tuple(kind.name.lower() for kind in comfy.sd.CLIPType)      # what the host's loaders offer, in its order
DTYPE = torch.float32       # the host runs text encoders in it


def load(paths: Sequence[str], kind: str, device: str = "default", embeddings: Sequence[str] = (), options: dict | None = None,
         disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """One text encoder, or two that belong together, of which each may be GGUF or safetensors. kind: one of TYPES.

    BadFile, one sentence, where a file is not what it says it is.
    """
    if kind not in TYPES:
        raise ValueError(f"unknown type '{kind}'; known: {', '.join(TYPES)}")
    files = [open_file(path) for path in paths]
    dicts = [state_dict(file) for file in files]
    told = {**(options or {}), "custom_operations": packed_ops(DTYPE, full_precision=True)}
    if device == "cpu":
        told["load_device"] = told["offload_device"] = torch.device("cpu")
    for file, sd in zip(files, dicts, strict=True):
        if comfy.sd.detect_te_model(sd) is None:
            raise BadFile(f"'{file.name}' is no text encoder that ComfyUI knows; choose another file")
    clip = comfy.sd.load_text_encoder_state_dicts(dicts, embedding_directory=list(embeddings), clip_type=comfy.sd.CLIPType[kind.upper()],
                                                  model_options=told, disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init = (load_patcher, (tuple(map(str, paths)), kind, device, tuple(embeddings), options))    # a reload does the same again
    return clip


def load_patcher(paths, kind, device, embeddings, options, disable_dynamic: bool = False):
    return load(paths, kind, device, embeddings, options, disable_dynamic).patcher


def state_dict(file: WeightFile) -> dict:
    """Under the host's names, with the layers of a GGUF file packed."""
    if file.container != "gguf":
        return comfy.utils.convert_old_quants(dict(file.tensors), model_prefix="", metadata=dict(file.metadata))[0]
    names = names_of(expect_architecture(file, KNOWN, "a text encoder", "a diffusion model goes to Quantized Model Loader"))
    layers, rest = layers_of(file)
    weights = {f"{name}.weight": layer.packed(DTYPE) if layer.packed is not None else layer.host[".weight"] for name, layer in layers.items()}
    tensors = renamed(rest | weights, names, file.name)
    for key, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise whole_numbers(file.name, key, tensor)
    return tensors


def line(clip: comfy.sd.CLIP, paths: Sequence[Path]) -> str:
    size = sum(path.stat().st_size for path in paths)
    return f"{', '.join(path.name for path in paths)}: {size / 2**30:.2f} GiB on disk, {clip.patcher.model_size() / 2**30:.2f} GiB in memory"
