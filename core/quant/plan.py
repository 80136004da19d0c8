"""Which layer is stored and computed how.

    auto    the fastest that the device runs well: int8 where its products are fast, else what the file has
    int8    every layer that is not sensitive; blocks of GGUF stay packed and become int8 for each product
    fp8     the same, as scaled fp8
    bf16    full precision; blocks of GGUF stay packed
    host    as the file has it

A saved plan (Quantization Report) says so layer by layer and stands above all this.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..knob import shown
from .files import BadFile, json_of
from .layer import Layer
from .sensitive import is_sensitive, matches
from .transcode import TRANSCODERS

COMPUTE = ("auto", "int8", "fp8", "bf16", "host")
DEVICES = ("default", "cpu")
TARGETS = ("stored", *TRANSCODERS, "full", "packed", "packed int8")
FULL = ("bf16", "fp16", "fp32")
MOST = 1 << 22      # bytes of a plan file


@dataclass(frozen=True)
class Settings:
    """What the user chose at the loader. Everything in it is plain data, so that a reload repeats it."""

    compute: str = "auto"
    exclude: tuple[str, ...] = ()               # patterns of names whose layers stay as the file has them
    format: str = "auto"                        # a format that the file must have
    device: str = "default"
    layers: Mapping[str, str] = field(default_factory=dict)    # a saved plan: layer -> target

    def __post_init__(self):
        for what, chosen, known in (("compute", self.compute, COMPUTE), ("device", self.device, DEVICES)):
            if chosen not in known:
                raise ValueError(f"unknown {what} '{str(chosen)[:100]}'; known: {', '.join(known)}")
        if isinstance(self.exclude, str) or not isinstance(self.exclude, Sequence) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ValueError(f"exclude is '{shown(self.exclude)}'; patterns of layer names were expected, or nothing")
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers is '{shown(self.layers)}'; a plan was expected, a target for each layer by its name, or nothing")


def patterns(text: str) -> tuple[str, ...]:
    """Those of "double_blocks.0.*, *txt_mlp*"."""
    if not isinstance(text, str):
        raise ValueError(f"exclude is '{shown(text)}'; a text of patterns was expected, such as 'double_blocks.0.*, *txt_mlp*', or an empty one")
    return tuple(part.strip() for part in text.split(",") if part.strip())


def plan(
    layers: Mapping[str, Layer], linears: frozenset[str], family: str, settings: Settings, fast_int8: bool, native: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Layer -> one of TARGETS.

    linears: layers that the network multiplies by as a linear layer does; all others stay as they are.
    native: formats whose own products the device runs at full speed.
    """
    if lost := [name for name in settings.layers if name not in layers]:
        raise ValueError(f"the plan is for another model: it has {len(lost)} layers that this file lacks, the first is '{lost[0]}'")
    kept = {name for name in layers if name not in linears or is_sensitive(name, family) or matches(name, settings.exclude)}
    asked = {name: "host" if name in kept else settings.compute for name in layers}
    for name, where in settings.layers.items():
        if where == "nvfp4" and (name not in linears or is_sensitive(name, family)):
            raise ValueError(f"the plan makes '{name}' nvfp4, and a layer that is sensitive cannot be; take the layer out of the plan")
    planned = {name: "stored" if where == "full" and layers[name].format in FULL else where for name, where in settings.layers.items()}
    return {name: planned.get(name) or target(layer, asked[name], fast_int8, native) for name, layer in layers.items()}


def target(layer: Layer, compute: str, fast_int8: bool, native: frozenset[str]) -> str:
    if compute == "auto":
        compute = "int8" if fast_int8 and layer.format not in native else "host"
    if compute == "host":
        return "stored" if layer.host is not None else "packed" if layer.packed is not None else "full"
    if layer.packed is not None and not layer.transcode:
        return "packed int8" if compute == "int8" and layer.packed_int8 is not None else "packed"
    if compute == "bf16":
        return "stored" if layer.format in FULL else "full"
    if compute == "int8" and layer.format == "int8_tensorwise":
        return "stored"
    return compute


def read_plan(path: Path) -> dict[str, str]:
    """A plan that Quantization Report saved."""
    try:
        if path.stat().st_size > MOST:
            raise BadFile(f"'{path.name}' is too large for a plan")
        content = json_of(path.read_bytes(), f"'{path.name}'")
    except OSError as error:
        raise BadFile(f"the plan '{path.name}' cannot be read: {error.strerror or error}") from error
    layers = content.get("layers")
    if content.get("kind") != "reprise quantization plan" or not isinstance(layers, dict):
        raise BadFile(f"'{path.name}' is JSON, and no plan of Quantization Report")
    if not layers:
        raise BadFile(f"'{path.name}' is a plan without layers, which would change nothing; save one with Quantization Report, or choose none")
    for name, where in layers.items():
        if where not in TARGETS:
            raise BadFile(f"'{path.name}': '{name}' is to become {where!r}; known: {', '.join(TARGETS)}")
    return layers


def write_plan(path: Path, layers: Mapping[str, str], **told) -> None:
    """Written whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"kind": "reprise quantization plan", **told, "layers": dict(layers)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
