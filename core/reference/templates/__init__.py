"""Diffusion Templates for FLUX.2 klein: a file of weights that makes keys and values, or a LoRA, of what the user asks for.

    softmax(Q [K; K_1; K_2; ...]^T) [V; V_1; V_2; ...]       at every block and every step, behind the rotation of K

What a template makes depends neither on the base model nor on the step, so it is made once, in the node. A published
template brings a model.py beside its weights; it is never run: a kind is told by the names and shapes of its tensors.
From Duan, Zhang and Chen, "Diffusion Templates", arXiv 2604.24351.
"""
from ...registry import Registry
from .base import FLOATS, WrongTemplate, check, seen
from .constant import Constant
from .file import File
from .image import Image
from .lora import LoraBank
from .scalar import Scalar
from .text import Text

KINDS = Registry("kind of template", Scalar, Constant, Image, LoraBank, Text)
OTHER_BASES = {".block_0.": "Qwen-Image"}       # what names of tensors tell of templates for another model


def template_of(file: File, **options):
    """The template in a file. `options` go to a kind that has a use for them."""
    for kind in KINDS.values():
        if kind.recognises(file.shapes):
            check(file, getattr(kind, "types", FLOATS))
            return kind.read(file, **{name: value for name, value in options.items() if name in kind.options})
    for sign, base in OTHER_BASES.items():
        if any(sign in key for key in file.shapes):
            raise WrongTemplate(f"{file.name} is a template for {base}, with keys such as {seen(file.shapes)}; load one for FLUX.2 klein")
    raise WrongTemplate(f"{file.name} is no template that is known here ({', '.join(KINDS)}): its keys are {seen(file.shapes)}; "
                        "load the model.safetensors of a Diffusion Template for FLUX.2 klein")
