"""The trained emoji models, whose layers are whole blocks of 256, as files of every format; and the pictures they draw."""
from itertools import islice
from pathlib import Path

from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from torch import Tensor

from . import _pictures
from testbed import gguf_files, quantized

FAMILIES = {"flux": _pictures.SUBJECTS[0], "z_image": _pictures.SUBJECTS[1]}
FULL = ("bf16", "fp16", "fp32")
PICTURES, STEPS = 2, 20


def full(family: str) -> Path:
    return _pictures.MODELS / FAMILIES[family].file


def safetensors(form: str):
    return lambda family, folder: quantized.write(FAMILIES[family].file, form, folder / "model.safetensors")


def blocks(type: str):
    return lambda family, folder: quantized.write_gguf(FAMILIES[family].file, type, folder / "model.gguf")


def nunchaku(kind: str):
    return lambda family, folder: quantized.write_svdquant(FAMILIES[family].file, folder / "model.safetensors", kind)


FILES = {      # format -> (family, folder) -> the file
    **{form: safetensors(form) for form in quantized.WRITERS},
    **{type: blocks(type) for type in gguf_files.TYPES},
    "SVDQuant int4": nunchaku("int4"),
    "SVDQuant nvfp4": nunchaku("nvfp4"),
}


def drawn(family: str, patcher) -> list[Tensor]:
    subject = FAMILIES[family]
    patcher = patcher if subject.shift is None else ModelSamplingAuraFlow().patch_aura(patcher, subject.shift)[0]
    return [_pictures.sample(patcher, caption, noise, STEPS, 1.0, "euler") for caption, noise in islice(subject.pictures(), PICTURES)]


def nearness(found: list[Tensor], true: list[Tensor]) -> float:
    return sum(_pictures.psnr(one, other) for one, other in zip(found, true, strict=True)) / len(true)
