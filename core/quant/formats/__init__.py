"""How files store weights. A new format is a file here and a line below; the order is that in which they look at a file."""
from ..files import WeightFile
from ..layer import Layer
from .base import Format
from .fp8 import ScaledFP8, UnscaledFP8
from .gguf import GGUF
from .host import HostFormats
from .plain import Plain
from .svdquant import SVDQuant

FORMATS: tuple[Format, ...] = (
    SVDQuant(),
    HostFormats(),
    ScaledFP8(),
    UnscaledFP8(),
    GGUF(),
    Plain(),
)


def layers_of(file: WeightFile) -> tuple[dict[str, Layer], dict]:
    """Every linear layer of the file by name, and the tensors that belong to none."""
    left = {**file.tensors, **file.packed}
    layers = {layer.name: layer for form in FORMATS for layer in form.claim(file, left)}
    return layers, left


def known_formats() -> list[str]:
    """What a layer can be stored as, for menus."""
    return list(dict.fromkeys(name for form in FORMATS for name in form.names))


__all__ = ["FORMATS", "Format", "known_formats", "layers_of"]
