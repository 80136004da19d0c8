"""A safetensors file, told apart by its header and read when it is needed."""
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import comfy.utils
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...knob import shown
from ..weights import finite

CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class File:
    """shapes: of its tensors; types: theirs, as the header spells them."""

    path: Path
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    types: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the whole content; once for each state of the file."""
        found = self.path.stat()
        return digest_of(self.path, found.st_size, found.st_mtime_ns)

    def tensors(self) -> dict[str, Tensor]:
        """All of them; a ValueError names the first that holds no numbers."""
        found = comfy.utils.load_torch_file(str(self.path), safe_load=True)
        if lost := [key for key, tensor in found.items() if not finite(tensor)]:
            raise ValueError(f"{self.name} has values in {shown(lost[0])} that are no numbers, which would make the whole picture so; download it again")
        return found


def opened(path: Path, name: str) -> File:
    """The file's header; a ValueError says in a sentence why there is none."""
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{name} is no safetensors file, and other files may run code when they are read; choose the template's model.safetensors")
    if not path.is_file() or not path.stat().st_size:
        raise ValueError(f"{name} is {'empty' if path.is_file() else 'not there'}; download the template again")
    try:
        with safe_open(str(path), framework="pt") as content:
            slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 - not a dict
            return File(path, name, {key: tuple(part.get_shape()) for key, part in slices.items()}, tuple(sorted({p.get_dtype() for p in slices.values()})))
    except SafetensorError as fault:
        raise ValueError(f"{name} is truncated or no safetensors file ({fault}); download it again") from None


@lru_cache(maxsize=64)
def digest_of(path: Path, size: int, changed: int) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content.update(chunk)
    return content.hexdigest()
