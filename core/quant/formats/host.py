"""The host's own quantized layers: marked by `comfy_quant` or by the header's `_quantization_metadata`.

They are unpacked by the host's layouts. A layer that the installed host does not know is told before it would fail to load.
"""
import dataclasses

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class
from torch import Tensor

from ..files import BadFile, WeightFile, json_of
from ..layer import Layer
from .fp8 import marker

WEIGHT, MARK = ".weight", ".comfy_quant"
NEEDED = {      # what each format stores beside its weight, [N, K] being the layer's shape
    "float8_e4m3fn": ("weight_scale",), "float8_e5m2": ("weight_scale",), "mxfp8": ("weight_scale",), "nvfp4": ("weight_scale", "weight_scale_2"),
    "int8_tensorwise": ("weight_scale",), "convrot_w4a4": ("weight_scale",),
}
SPOKEN = {"float8_e4m3fn": "float8_e4m3fn scaled", "float8_e5m2": "float8_e5m2 scaled"}     # told apart from casts without scales
HALF = ("nvfp4", "convrot_w4a4")        # two weights in a byte
MORE = ("input_scale", "pre_quant_scale")


class HostFormats:
    names = tuple(SPOKEN.get(form, form) for form in NEEDED)
    note = "Files in ComfyUI's own formats; nvfp4 and mxfp8 are handed to it."

    def claim(self, file: WeightFile, left: dict):
        told = {}
        if "_quantization_metadata" in file.metadata:
            header = json_of(file.metadata["_quantization_metadata"], f"'{file.name}': _quantization_metadata")
            told = header.get("layers")
            if not isinstance(told, dict):
                raise BadFile(f"'{file.name}': _quantization_metadata has no list of layers; the file was written by something that does not follow the format")
        for key in [key for key in left if key.endswith(MARK)]:
            mark = left.pop(key)
            if not isinstance(mark, Tensor) or mark.dtype is not torch.uint8 or mark.numel() > 1 << 16:
                raise BadFile(f"'{file.name}': '{key}' is not the mark of a quantized layer")
            told = told | {key.removesuffix(MARK): json_of(mark.numpy().tobytes(), f"'{file.name}': '{key}'")}
        for name, conf in told.items():
            if name + WEIGHT in left:
                yield self.layer(file, left, name, conf)

    def layer(self, file: WeightFile, left: dict, name: str, conf: dict) -> Layer:
        form = conf.get("format") if isinstance(conf, dict) else None
        if not isinstance(form, str) or form not in QUANT_ALGOS or form not in NEEDED:
            known = ", ".join(sorted(QUANT_ALGOS.keys() & NEEDED.keys()))
            raise BadFile(f"'{file.name}': layer '{name}' is stored as {form!r}, which this ComfyUI does not know; it knows {known}; update ComfyUI")
        weight = left.pop(name + WEIGHT)
        parts = {part: left.pop(f"{name}.{part}") for part in (*NEEDED[form], *MORE) if f"{name}.{part}" in left}
        if missing := [part for part in NEEDED[form] if part not in parts]:
            raise BadFile(f"'{file.name}': layer '{name}' is stored as {form} and lacks its {missing[0]}; download the file again")
        stored = QUANT_ALGOS[form]["storage_t"]
        if weight.ndim != 2 or weight.element_size() != stored.itemsize:
            raise BadFile(f"'{file.name}': layer '{name}' is stored as {form} and holds {str(weight.dtype).removeprefix('torch.')} of {weight.ndim} dimensions")
        shape = (weight.shape[0], weight.shape[1] * (2 if form in HALF else 1))
        self.check_scale(file, name, form, shape, parts, conf)
        host = {WEIGHT: weight, MARK: marker(**conf), **{f".{part}": tensor for part, tensor in parts.items()}}
        return Layer(
            name=name, format=SPOKEN.get(form, form), shape=shape, nbytes=weight.nbytes, host=host,
            unpack=lambda start, stop: self.unpack(form, weight, parts, conf, shape, start, stop))

    @staticmethod
    def check_scale(file: WeightFile, name: str, form: str, shape: tuple[int, int], parts: dict, conf: dict) -> None:
        scale, (rows, columns) = parts["weight_scale"], shape
        fits = {
            "int8_tensorwise": scale.numel() in (1, rows), "convrot_w4a4": scale.numel() == rows,
            "mxfp8": scale.numel() * 32 >= rows * columns, "nvfp4": scale.numel() * 16 >= rows * columns,
        }.get(form, scale.numel() == 1)
        for part in ("weight_scale", "weight_scale_2"):
            if part in parts and not numbers(parts[part], form, part):
                raise BadFile(f"'{file.name}': layer '{name}' is stored as {form}, and its {part} has values that are no numbers; download the file again")
        if not fits:
            raise BadFile(f"'{file.name}': layer '{name}' is stored as {form}, whose {rows} x {columns} weights and {scale.numel()} scales do not fit")
        group = option(conf, "convrot_groupsize", 256)
        if option(conf, "convrot", False) and (not isinstance(group, int) or group not in (4, 16, 64, 256, 1024) or columns % group):
            raise BadFile(f"'{file.name}': layer '{name}' says it is rotated in groups of {group!r}, and has {columns} columns")

    @staticmethod
    def unpack(form: str, weight: Tensor, parts: dict, conf: dict, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        layout, (rows, columns) = QUANT_ALGOS[form]["comfy_tensor_layout"], shape
        given = {"scale": parts["weight_scale"]}
        if form in ("nvfp4", "mxfp8"):      # their scales are swizzled over the whole layer
            start_, stop_ = 0, rows
            given = {"scale": parts["weight_scale"].view(torch.float8_e8m0fnu)} if form == "mxfp8" else {
                "scale": parts["weight_scale_2"].float(), "block_scale": parts["weight_scale"].view(torch.float8_e4m3fn)}
        else:
            start_, stop_ = start, stop
            if given["scale"].numel() == rows and rows > 1:
                given["scale"] = given["scale"].reshape(rows, *given["scale"].shape[1:])[start:stop]
        if form == "int8_tensorwise" and option(conf, "convrot", False):
            given |= {"convrot": True, "convrot_groupsize": option(conf, "convrot_groupsize", 256)}
        if form == "convrot_w4a4":
            given |= {"convrot_groupsize": option(conf, "convrot_groupsize", 256), "quant_group_size": 64, "linear_dtype": option(conf, "linear_dtype", "int4")}
        kind = get_layout_class(layout).Params
        known = {field.name for field in dataclasses.fields(kind)}
        params = kind(**{key: value for key, value in given.items() if key in known}, orig_dtype=torch.float32, orig_shape=(stop_ - start_, columns))
        whole = QuantizedTensor(weight[start_:stop_].view(QUANT_ALGOS[form]["storage_t"]), layout, params).dequantize()
        return whole[start - start_:stop - start_]


def numbers(scale: Tensor, form: str, part: str) -> bool:
    """Whether scales are finite. Those of blocks are bytes: in e8m0 255 is none, in e4m3 seven bits set."""
    if form == "mxfp8":
        return scale.element_size() == 1 and not bool((scale.view(torch.uint8) == 255).any())
    if form == "nvfp4" and part == "weight_scale":
        return scale.element_size() == 1 and not bool((scale.view(torch.uint8) & 127 == 127).any())
    return scale.is_floating_point() and bool(scale.float().isfinite().all())


def option(conf: dict, name: str, default):
    """A setting of a layer, which files have at the top or under `params`."""
    params = conf.get("params")
    return conf.get(name, params.get(name, default) if isinstance(params, dict) else default)
