"""GGUF files: the header is checked here, then read by the `gguf` package; the tensors are views of the mapped file."""
from __future__ import annotations

import math
import mmap
from collections.abc import Collection
from pathlib import Path

import torch

from ..knob import shown
from .files import BadFile, Blocks, WeightFile
from .gguf_header import Header, read_header

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
          "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
ARCHITECTURE = "general.architecture"
TEXT_MODELS = ("t5", "t5encoder", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "llama", "gemma2", "gemma3", "mistral3", "clip")    # and no picture models
OF_TEXT = ("token_embd.", "blk.", "enc.blk.", "v.blk.")     # how their tensors' names begin
ANY = "pig"     # what one converter writes into every file
ARCHITECTURES: dict[str, tuple[str, ...]] = {       # general.architecture, as files for ComfyUI have it -> families of the host, "" being all without a name
    "flux": ("flux", "flux2", "chroma", "chroma_radiance"), "lumina2": ("lumina2",), "z_image": ("lumina2",), "sd3": ("sd3",),
    "qwen_image": ("qwen_image",), "wan": ("wan2.1",), "ltxv": ("ltxv", "ltxav"), "hyvid": ("hunyuan_video",), "hidream": ("hidream", "hidream_o1"),
    "cosmos": ("cosmos", "cosmos_predict2", "anima"), "aura": ("",), "sd1": ("",), "sdxl": ("",),
}


def package(path: Path):
    """The `gguf` package; BadFile where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise BadFile(f"'{path.name}' is a GGUF file, and the package that reads them is not installed; run 'pip install gguf' "
                      "in ComfyUI's Python and start it again") from error
    return gguf


def read_gguf(path: Path | str) -> WeightFile:
    """Opens a GGUF file. BadFile where it is not whole or holds a type of blocks that is not read here."""
    from .blocks import TYPES

    path = Path(path)
    gguf = package(path)
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = read_header(data, path.name, sizes)
    names = {int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES}
    for info in header.infos:
        if names[info.type] not in FLOATS and names[info.type] not in TYPES:
            raise BadFile(f"'{path.name}': tensor '{info.name[:100]}' is stored as {names[info.type]}, which is not read here; "
                          f"take a file of {', '.join(TYPES)}, F16 or BF16")
    try:
        reader = checked_reader(gguf, header)(path, "c")    # private: a write of somebody's goes to memory, never to the file
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"'{path.name}' is not read by the gguf package ({error}); download it again") from error
    settings = header.settings | {f"comfy.gguf.orig_shape.{name}": ",".join(map(str, shape)) for name, shape in header.shapes.items()}
    found = WeightFile(path, "gguf", settings, {})
    for info, tensor in zip(header.infos, reader.tensors, strict=True):
        if (tensor.name, tensor.data_offset, tensor.n_bytes) != (info.name, info.offset, info.nbytes):
            raise BadFile(f"'{path.name}': the gguf package finds tensor '{info.name[:100]}' elsewhere than its header says; update the package")
        shape = header.shapes.get(info.name, info.shape)
        if math.prod(shape) != math.prod(info.shape):
            raise BadFile(f"'{path.name}': tensor '{info.name[:100]}' has {list(info.shape)} elements and was {list(shape)}; the file is damaged")
        raw = torch.from_numpy(tensor.data.reshape(-1).view("uint8"))
        if (dtype := FLOATS.get(names[info.type])) is not None:
            found.tensors[info.name] = raw.view(dtype).reshape(shape)
        else:
            block, nbytes = sizes[info.type]
            found.packed[info.name] = Blocks(names[info.type], shape, raw.view(-1, info.shape[-1] // block * nbytes))
    return found


def checked_reader(gguf, header: Header) -> type:
    """The package's reader, told where lists end: it makes an object of every entry, of which a vocabulary has hundreds of thousands."""
    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, at: int, kind: int):
            if (size := header.lists.get(int(at))) is not None:
                return size, [self.data[int(at):int(at) + size]], [0], [gguf.GGUFValueType.ARRAY]
            return super()._get_field_parts(at, kind)

    return Reader


def expect_architecture(file: WeightFile, known: Collection[str], what: str, instead: str) -> str:
    """What the file says it is; BadFile if that is not among `known`. what: "a text encoder". instead: what to do."""
    told = file.metadata.get(ARCHITECTURE, "nothing")
    if told not in known:
        raise BadFile(f"'{file.name}' says it is '{told[:100]}', and {what} ({', '.join(known)}) was expected; {instead}")
    return told


def refuse_text_model(file: WeightFile) -> None:
    """For the loader of diffusion models: BadFile where a text encoder came, by what the file says and by the names of its tensors."""
    told = file.metadata.get(ARCHITECTURE, "")
    if told in TEXT_MODELS and any(key.startswith(OF_TEXT) for key in (*file.tensors, *file.packed)):
        raise BadFile(f"'{file.name}' is a text model ('{told}'), and a diffusion model was expected; load it with GGUF Text Encoder Loader")


def strange_architecture(file: WeightFile, family: str) -> str:
    """A sentence where a GGUF file says that it is another model than its tensors are, which decide. family: the host's, "" where it has no name."""
    told = file.metadata.get(ARCHITECTURE) if file.container == "gguf" else None
    if told is None or told == ANY or plainly(told) == plainly(family) or family in ARCHITECTURES.get(plainly(told), ()):
        return ""
    return f"the file says it is '{shown(' '.join(told.split()))}' and its tensors are those of {family or 'a UNet'}, as which it was loaded"


def plainly(name: str) -> str:
    return name.lower().replace("-", "_")
