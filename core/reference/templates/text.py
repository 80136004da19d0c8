"""Templates that make text: further tokens behind those of the prompt, in whose order their positions go on."""
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Shapes, WrongTemplate
from .file import File

KEYS = ("text_embedding", "extra_text_embedding")       # as the published pipeline calls it


@dataclass(frozen=True, eq=False)
class Text:
    file: File
    key: str

    name, options = "text", ()

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return len(shapes) == 1 and next(iter(shapes)) in KEYS

    @classmethod
    def read(cls, file: File) -> "Text":
        (key, shape), = file.shapes.items()
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
            raise WrongTemplate(f"{file.name} holds a text embedding of shape {list(shape)}; expected [tokens, channels]")
        return cls(file, key)

    def embedding(self) -> Tensor:
        """[1, N, C]"""
        tensor = self.file.tensors()[self.key]
        return tensor if tensor.ndim == 3 else tensor[None]


def with_text(conditioning: list, template: Text) -> list:
    """A CONDITIONING with the template's tokens behind its own; several templates follow one another."""
    more = template.embedding()

    def joined(text: Tensor) -> Tensor:
        if text.shape[2] != more.shape[2]:
            raise ValueError(f"{template.file.name} has text of {more.shape[2]} channels and the prompt {text.shape[2]}; "
                             "encode the prompt with the text encoder that the template was made for")
        return torch.cat([text, more.to(text).expand(len(text), -1, -1)], dim=1)

    return [[joined(text), dict(others)] for text, others in conditioning]
