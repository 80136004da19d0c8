"""What kinds of template have in common: how blocks are named, how keys and values lie, and how a file is refused."""
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ...knob import shown
from ..entry import Entry, Key
from .file import File

FAMILY = "flux2"
HEAD = 128      # channels of a head in every FLUX
SYSTEM = "diffusion templates 1"
BLOCK = r"(?:double|single)_\d+"        # as templates name blocks
TOLD = 4        # keys in a sentence
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")    # as a file's header spells them

Shapes = Mapping[str, tuple[int, ...]]


class WrongTemplate(ValueError):
    """A file that is no template, or is not whole."""


def seen(keys: Collection[str]) -> str:
    """Some of the keys of a file, for a sentence."""
    first = [repr(shown(key)) for key in list(keys)[:TOLD]]
    return (", ".join(first) + (f" and {len(keys) - TOLD} more" if len(keys) > TOLD else "")) or "none"


def in_order(blocks: Iterable[str], file: str) -> tuple[str, ...]:
    """Blocks as the network runs them: double_0, double_1, ..., single_0, ...; none may be left out."""
    ordered = sorted(set(blocks), key=lambda block: (block.split("_")[0], int(block.split("_")[1])))
    for kind in ("double", "single"):
        found = [block for block in ordered if block.startswith(kind)]
        if found != [f"{kind}_{i}" for i in range(len(found))]:
            raise WrongTemplate(f"{file} has {len(found)} {kind}-stream blocks up to {found[-1]} and leaves some out; it is not whole, download it again")
    return tuple(ordered)


def check_shapes(file: File, wanted: Shapes) -> None:
    """Raise unless the file has these tensors, and these alone."""
    for key, shape in wanted.items():
        if key not in file.shapes:
            raise WrongTemplate(f"{file.name} has no {key}; it is not whole, download it again")
        if file.shapes[key] != shape:
            raise WrongTemplate(f"{file.name}: {key} is {list(file.shapes[key])} where {list(shape)} belongs; download it again")
    if strange := [key for key in file.shapes if key not in wanted]:
        raise WrongTemplate(f"{file.name} has keys that its kind of template has not ({seen(strange)}); load one of the published templates for FLUX.2 klein")


def check(file: File, types: Collection[str]) -> None:
    """Raise unless every tensor holds something, of one of these types."""
    if strange := [kind for kind in file.types if kind not in types]:
        raise WrongTemplate(f"{file.name} has tensors of type {shown(strange[0])} where a template's are {', '.join(types)}; download it again")
    if empty := [key for key, shape in file.shapes.items() if 0 in shape]:
        raise WrongTemplate(f"{file.name}: {shown(empty[0])} is of shape {list(file.shapes[empty[0]])}, which holds nothing; download it again")


def check_width(file: File, width: int) -> None:
    if not width or width % HEAD:
        raise WrongTemplate(f"{file.name} has keys and values of width {width}, which is no number of heads of {HEAD} channels; "
                            "load a template for FLUX.2 klein")


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """The type of an entry whose template is stored in `dtype`."""
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def by_head(tokens: Tensor) -> Tensor:
    """[T, H x D] as attention has it: [1, H, T, D]."""
    return tokens.unflatten(-1, (-1, HEAD)).transpose(0, 1)[None].contiguous()


def key_of(file: File, inputs: str, numerics: str) -> Key:
    """It has no field for the base model, the step, the seed or the picture's size: nothing hangs on them."""
    return Key({"system": SYSTEM, "template": file.digest, "inputs": inputs, "numerics": numerics})


def entry_of(blocks: Mapping[str, tuple[Tensor, Tensor]], key: Key, source: str, rope: str) -> Entry:
    """blocks: by the template's names or by the network's."""
    return Entry(FAMILY, {re.sub(r"_(\d+)$", r".\1", name): pair for name, pair in blocks.items()}, key, source, rope)
