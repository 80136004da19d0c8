"""A model file in any format that is read here, as an ordinary MODEL.

The file becomes a state dict in the host's own formats, layer by layer, and the host loads that: partial loading, LoRA, saving,
clones and dynamic memory are its own. Where layers stay packed, custom operations compute them.
"""
from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from . import transcode
from .capabilities import capabilities
from .detect import detect, without_prefix
from .files import BadFile, WeightFile, open_file
from .formats import layers_of
from .formats.svdquant import KIND
from .gguf_file import refuse_text_model, strange_architecture
from .layer import Layer
from .packed import own_product
from .packed_ops import packed_ops
from .plan import Settings, plan
from .sensitive import matches
from .svdquant.served import NATIVE, served

log = logging.getLogger("reprise")
METADATA, TYPES = "reprise.metadata", "reprise.types"     # attachments, for saving


@dataclass(frozen=True)
class Loaded:
    """What was done, for the line under the node and for the benchmark."""

    name: str
    family: str
    layers: Mapping[str, str]           # layer -> target
    formats: Mapping[str, str]          # layer -> format in the file
    file_bytes: int
    seconds: float
    warnings: tuple[str, ...] = ()      # told before anything was loaded

    def line(self) -> str:
        kept = Counter(f"{self.formats[name]} as stored" if target == "stored" else f"{self.formats[name]} to {NAMES[target]}"
                       for name, target in self.layers.items())
        done = ", ".join(f"{count} layers {what}" for what, count in kept.most_common())
        return "; ".join((f"{self.name}: {done}", f"{self.seconds:.1f} s", *self.warnings))


NAMES = {"int8": "int8", "fp8": "scaled fp8", "nvfp4": "nvfp4", "full": "full precision", "packed": "packed", "packed int8": "packed, computed as int8"}


def load(path: Path | str, settings: Settings, disable_dynamic: bool = False, report: Callable[[Loaded], None] = lambda loaded: None):
    """A ModelPatcher. BadFile, one sentence, where the file is not what it says it is; nothing is left allocated then."""
    file = open_file(path)
    refuse_text_model(file)
    patcher, loaded = load_file(file, settings, disable_dynamic)
    patcher.cached_patcher_init = (load, (str(path), settings))      # a reload does the same again
    report(loaded)
    log.info("Reprise: %s", loaded.line())
    return patcher


def load_file(file: WeightFile, settings: Settings, disable_dynamic: bool = False):
    """Of tensors that are already at hand, (ModelPatcher, Loaded)."""
    began = time.perf_counter()
    file = stripped(file)
    layers, rest = layers_of(file)
    if settings.format != "auto" and all(layer.format != settings.format for layer in layers.values()):
        found = ", ".join(sorted({layer.format for layer in layers.values()})) or "no layer"
        raise BadFile(f"'{file.name}' has {found}, and {settings.format} was asked for; choose format auto")
    shapes = {**rest, **{f"{name}.weight": torch.empty(layer.shape, dtype=torch.bfloat16, device="meta") for name, layer in layers.items()}}
    config, linears = detect(shapes, file.metadata, file.name)
    family = family_of(config)
    device = torch.device("cpu") if settings.device == "cpu" else comfy.model_management.get_torch_device()
    targets = plan(layers, linears, family, settings, *abilities(device))
    idle = [pattern for pattern in settings.exclude if not any(matches(name, (pattern,)) for name in layers)]
    strange = strange_architecture(file, family)
    warnings = (*unfit(layers, targets, device, file.name), *([strange] if strange else ()), *(f"'{pattern}' excludes no layer" for pattern in idle))
    options = {"load_device": device, "offload_device": torch.device("cpu")} if settings.device == "cpu" else {}
    dtype = comfy.model_management.unet_manual_cast(None, device, config.supported_inference_dtypes)
    sd = state_dict(layers, rest, targets, dtype, device)
    own = own_product(device) and any(target == "int8" or target == "stored" and layers[name].format == "int8_tensorwise" for name, target in targets.items())
    if own or {"packed", "packed int8"} & set(targets.values()):
        options["custom_operations"] = packed_ops(dtype, own=own)
    types = {key: tensor.dtype for key, tensor in sd.items()}
    patcher = comfy.sd.load_diffusion_model_state_dict(sd, model_options=options, metadata=file.metadata, disable_dynamic=disable_dynamic)
    if patcher is None:
        raise BadFile(f"'{file.name}' is no diffusion model that ComfyUI knows; choose a file of models/diffusion_models")
    patcher.set_attachments(METADATA, dict(file.metadata))      # some models cannot be told without it, so saving keeps it
    patcher.set_attachments(TYPES, types)
    size = file.path.stat().st_size if file.path.is_file() else sum(layer.nbytes for layer in layers.values())
    formats = {name: layer.format for name, layer in layers.items()}
    return patcher, Loaded(file.name, family, targets, formats, size, time.perf_counter() - began, warnings)


def abilities(device: torch.device) -> tuple[bool, frozenset[str]]:
    """(whether int8 products are fast, formats whose own products are)."""
    can = capabilities(device)
    native = {form for form in ("nvfp4", "mxfp8") if can.nvfp4.fast} | {form for form, kind in KIND.items() if served(device, kind).how == NATIVE}
    return can.int8.fast, frozenset(native | {"convrot_w4a4"})


def unfit(layers: Mapping[str, Layer], targets: Mapping[str, str], device: torch.device, name: str) -> tuple[str, ...]:
    """What the user is to know of packed layers that the device computes slowly."""
    told = []
    for form in sorted({layers[layer].format for layer, target in targets.items() if target == "packed"} & set(KIND)):
        how, sentence = served(device, KIND[form])
        if how != NATIVE:
            told.append(sentence)
            log.warning("Reprise: '%s': %s", name, sentence)
    return tuple(told)


def stripped(file: WeightFile) -> WeightFile:
    """The diffusion model's part of a whole checkpoint."""
    tensors, _ = without_prefix({**file.tensors, **file.packed})
    packed = {key: blocks for key, blocks in tensors.items() if not isinstance(blocks, Tensor)}
    return WeightFile(file.path, file.container, file.metadata, {key: tensor for key, tensor in tensors.items() if key not in packed}, packed)


def family_of(config) -> str:
    """The host's image_model; "sd3" for the one family whose configuration has none."""
    return config.unet_config.get("image_model") or ("sd3" if type(config).__name__ == "SD3" else "")


def state_dict(
    layers: Mapping[str, Layer], rest: Mapping[str, Tensor], targets: Mapping[str, str], dtype: torch.dtype, device: torch.device,
) -> dict[str, Tensor]:
    """The state dict for the host. One layer at a time is worked on, and of that a few rows; a progress bar counts weights."""
    work = [layer for name, layer in layers.items() if targets[name] not in ("stored", "packed")]
    bar = comfy.utils.ProgressBar(max(1, sum(layer.shape[0] * layer.shape[1] for layer in work)))
    done = 0

    def progress(weights: int) -> None:
        nonlocal done
        done += weights
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    made = dict(rest)
    for name, layer in layers.items():
        match targets[name]:
            case "stored":
                parts = layer.host
            case "full":
                parts = transcode.unpacked(layer, dtype, device, progress)
            case "packed":
                parts = {".weight": layer.packed(dtype)} if layer.packed is not None else None
            case "packed int8":
                parts = {".weight": layer.packed_int8(dtype)} if layer.packed_int8 is not None else None
            case other:
                parts = transcode.TRANSCODERS[other](layer, device, progress)
        if parts is None:
            raise BadFile(f"layer '{name}' is stored as {layer.format}, which cannot be kept as it is; choose another compute")
        made.update({name + suffix: tensor for suffix, tensor in parts.items()})
    return made
