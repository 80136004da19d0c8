"""SVDQuant int4 and nvfp4 files of nunchaku, for FLUX.1 and Z-Image.

Their layers are put together as the host has them and everything else gets the host's names. How their tensors are laid out is
told in svdquant/tiles.py, what their layers are called in svdquant/names.py; a size that does not fit is an error, never a guess.
Whoever reads the weights gets them with the low-rank branch in and the smoothing undone, so that they can be turned into int8.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..files import BadFile, WeightFile
from ..layer import Layer
from ..svdquant import awq
from ..svdquant.header import Header, header
from ..svdquant.names import FLUX_DOUBLE, FLUX_SINGLE, W3_W1, Z_IMAGE_BLOCK, Z_IMAGE_STACKS, Linear, Modulated, blocks, flux_rest, z_image_rest
from ..svdquant.stored import Stored, take
from ..svdquant.weight import Segment, Weight

INT4, NVFP4, AWQ = "SVDQuant int4", "SVDQuant nvfp4", "AWQ int4"
FORMAT = {"int4": INT4, "nvfp4": NVFP4}
KIND = {INT4: "int4", NVFP4: "nvfp4"}       # as svdquant.served asks for it
KNOWN = "FLUX.1 and Z-Image"


class SVDQuant:
    names = (INT4, NVFP4, AWQ)
    note = "Files of nunchaku for FLUX.1 and Z-Image, 4-bit weights with a low-rank branch; nunchaku itself is not needed."

    def claim(self, file: WeightFile, left: dict) -> Iterator[Layer]:
        quantized = [key.removesuffix(".wscales") for key in left if key.endswith(".wscales")]
        if not quantized:
            return
        head = header(file)
        if any(name.startswith("single_transformer_blocks.") for name in quantized):
            yield from flux(file, head, left)
        elif any(name.endswith(".attention.to_qkv") for name in quantized):
            yield from z_image(file, head, left)
        else:
            what = head.model_class or f"layers such as '{quantized[0]}'"
            raise BadFile(f"'{file.name}' is a nunchaku file with {what}, and of those {KNOWN} are read here; open it with nunchaku's own nodes")
        for key in left:
            if key.endswith((".qweight", ".wscales", ".wzeros", ".wcscales", ".wtscale")):
                raise BadFile(f"'{file.name}': '{key}' is of a quantized layer that {KNOWN} do not have; download the file again")


def flux(file: WeightFile, head: Header, left: dict) -> Iterator[Layer]:
    counts = []
    for stack, host, layers in (("transformer_blocks", "double_blocks", FLUX_DOUBLE), ("single_transformer_blocks", "single_blocks", FLUX_SINGLE)):
        found = blocks(left, stack)
        counts.append(len(found))
        for index, block in enumerate(found):
            if block != f"{stack}.{index}":
                raise BadFile(f"'{file.name}' has no block '{stack}.{index}' and goes on with '{block}'; it is not whole")
            for told in layers:
                yield from layer(file, head, left, block, f"{host}.{index}", told)
    flux_rest(left, *counts)


def z_image(file: WeightFile, head: Header, left: dict) -> Iterator[Layer]:
    counts = {}
    for stack in Z_IMAGE_STACKS:
        found = blocks(left, stack)
        counts[stack] = len(found)
        for block in found:
            for told in Z_IMAGE_BLOCK:
                if quantized(left, f"{block}.{told.parts[0][0]}"):
                    yield from layer(file, head, left, block, block, told)
            yield from w3_w1(file, head, left, block)
            whole_qkv(left, block)
            no_bias(file, left, block)
    z_image_rest(left, counts)


def quantized(left: dict, name: str) -> bool:
    return f"{name}.qweight" in left or f"{name}.wscales" in left


def layer(file: WeightFile, head: Header, left: dict, block: str, host: str, told: Linear | Modulated) -> Iterator[Layer]:
    """One layer of a block, and its bias back into `left`. Where the file has it unquantized, it gets the host's name."""
    host = f"{host}.{told.host}"
    if isinstance(told, Modulated):
        name = spelled(left, block, told.parts)
        if quantized(left, name):
            mod = awq.take(file, head, left, name, told.splits)
            left[f"{host}.bias"] = mod.bias
            yield Layer(name=host, format=AWQ, shape=mod.shape, unpack=mod.rows, nbytes=mod.nbytes, packed=mod.packed)
            return
        plain = [name]
    else:
        names = [spelled(left, block, spellings) for spellings in told.parts]
        if any(quantized(left, name) for name in names):
            parts = [take(file, head, left, name, gelu=told.gelu and name == names[-1]) for name in names]
            yield joined(file, left, host, parts, told.axis)
            return
        plain = names
    if len(plain) == 1:
        for end in (".weight", ".bias"):
            if plain[0] + end in left:
                left[host + end] = left.pop(plain[0] + end)
    elif any(f"{name}.weight" in left for name in plain):
        raise BadFile(f"'{file.name}': the layers of '{block}' are not quantized, which no file of nunchaku has for FLUX; download it again")


def spelled(left: dict, block: str, spellings: tuple[str, ...]) -> str:
    names = [f"{block}.{spelling}" for spelling in spellings]
    return next((name for name in names if quantized(left, name) or f"{name}.weight" in left), names[0])


def joined(file: WeightFile, left: dict, host: str, parts: list[Stored], axis: int) -> Layer:
    """One layer of the host, [N, K]; the file's biases, with what a shift of the input takes away, as the host's one bias."""
    first = parts[0]
    for part in parts[1:]:
        if part.kind != first.kind or part.shape[1 - axis] != first.shape[1 - axis]:
            told = " and ".join(f"'{part.name}' ({part.kind}, {part.shape[0]} x {part.shape[1]})" for part in parts)
            raise BadFile(f"'{file.name}': {told} do not make one layer; the file is damaged")
    lacking = [part.name for part in parts if part.bias is None]
    if lacking and (len(lacking) < len(parts) and parts[-1].bias is None or axis == 0 and len(lacking) < len(parts)):
        raise BadFile(f"'{file.name}': '{lacking[-1]}' lacks its bias, which the parts beside it have; download the file again")
    weight = Weight(tuple(Segment(part, 0, part.shape[0]) for part in parts), axis, offset(parts, axis))
    bias = bias_of(parts, axis, weight.offset)
    if bias is not None:
        left[f"{host}.bias"] = bias
    return as_layer(host, weight)


def as_layer(host: str, weight: Weight) -> Layer:
    return Layer(name=host, format=FORMAT[weight.kind], shape=weight.shape, unpack=weight.rows, nbytes=weight.nbytes, packed=weight.packed, transcode=True)


def offset(parts: list[Stored], axis: int) -> Tensor | None:
    """What the shifts of the inputs add to the layer's output."""
    added = [part.offset() for part in parts]
    if all(one is None for one in added):
        return None
    full = [torch.zeros(part.shape[0]) if one is None else one for part, one in zip(parts, added, strict=True)]
    return torch.cat(full) if axis == 0 else sum(full[1:], full[0])


def bias_of(parts: list[Stored], axis: int, added: Tensor | None) -> Tensor | None:
    if all(part.bias is None for part in parts) and added is None:
        return None
    dtype = next((part.bias.dtype for part in parts if part.bias is not None), parts[0].smooth.dtype)
    each = [torch.zeros(part.shape[0]) if part.bias is None else part.bias.float() for part in parts]
    bias = torch.cat(each) if axis == 0 else sum(each[1:], each[0])
    return (bias if added is None else bias + added).to(dtype)


def w3_w1(file: WeightFile, head: Header, left: dict, block: str) -> Iterator[Layer]:
    """Two layers of the host that stand above each other in the file."""
    name, w3, w1 = f"{block}.{W3_W1}", f"{block}.feed_forward.w3", f"{block}.feed_forward.w1"
    if quantized(left, name):
        stored = take(file, head, left, name)
        half = stored.shape[0] // 2
        for host, start in ((w3, 0), (w1, half)):
            yield as_layer(host, Weight((Segment(stored, start, start + half),)))
        left[f"{name}.bias"] = stored.bias
    elif matrix(left, f"{name}.weight") and left[f"{name}.weight"].shape[0] % 2 == 0:
        left[f"{w3}.weight"], left[f"{w1}.weight"] = left.pop(f"{name}.weight").chunk(2)


def whole_qkv(left: dict, block: str) -> None:
    """Refiners that are not quantized have their three apart."""
    names = [f"{block}.attention.to_{part}.weight" for part in "qkv"]
    if all(matrix(left, name) for name in names) and len({(left[name].shape[1], left[name].dtype) for name in names}) == 1:
        left[f"{block}.attention.qkv.weight"] = torch.cat([left.pop(name) for name in names])


def matrix(left: dict, name: str) -> bool:
    return isinstance(left.get(name), Tensor) and left[name].ndim == 2


def no_bias(file: WeightFile, left: dict, block: str) -> None:
    """Z-Image's layers have none; packers may write zeros."""
    for name in (*(told.host for told in Z_IMAGE_BLOCK), W3_W1):
        bias = left.pop(f"{block}.{name}.bias", None)
        if bias is not None and bool((bias != 0).any()):
            raise BadFile(f"'{file.name}': layer '{block}.{name}' has a bias, which Z-Image has not; the file is of another model")
