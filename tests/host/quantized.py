"""Models of the test bed as files of every format, and the pictures that they draw."""
from itertools import islice
from pathlib import Path

from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from torch import Tensor

from benchmarks import _pictures as bench
from testbed import quantized
from testbed.quantized import WRITERS, linear

SUBJECTS = {"flux": bench.SUBJECTS[2], "z_image": bench.SUBJECTS[3]}    # those of drawn shapes, whose pictures are new every time


def read(name: str):
    """The state dict, fp16, and the metadata."""
    return quantized.read(SUBJECTS[name].file)


def write(name: str, form: str, path: Path, in_header: bool = False) -> Path:
    return quantized.write(SUBJECTS[name].file, form, path, in_header)


def drawn(name: str, patcher, pictures: int = 2, steps: int = 20, cfg: float = 1.0) -> list[Tensor]:
    """Latents of the subject's first captions."""
    subject = SUBJECTS[name]
    return [bench.sample(shifted(subject, patcher), caption, noise, steps, cfg, "euler") for caption, noise in islice(subject.pictures(), pictures)]


def shifted(subject, patcher):
    return patcher if subject.shift is None else ModelSamplingAuraFlow().patch_aura(patcher, subject.shift)[0]


def nearness(found: list[Tensor], true: list[Tensor]) -> float:
    """PSNR of the decoded pictures, dB, mean."""
    return sum(bench.psnr(one, other) for one, other in zip(found, true, strict=True)) / len(true)


__all__ = ["SUBJECTS", "WRITERS", "bench", "drawn", "linear", "nearness", "read", "write"]
