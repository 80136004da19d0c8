"""Templates that take nothing and always make the same keys and values, such as PandaMeme.

Known in two forms: the learnt tokens of a template of numbers alone, proj_k.double_0.positional_embedding [T, C], and a
cache as the published pipeline hands it on, kv_cache.double_0.k [1, T, H, D]. K is not rotated.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..entry import Entry
from .base import BLOCK, HEAD, Shapes, WrongTemplate, by_head, check_shapes, check_width, entry_of, in_order, kept_as, key_of
from .file import File

FORMS = {
    "proj_{part}.{block}.positional_embedding": re.compile(rf"proj_[kv]\.({BLOCK})\.positional_embedding"),
    "kv_cache.{block}.{part}": re.compile(rf"kv_cache\.({BLOCK})\.[kv]"),
}


@dataclass(frozen=True, eq=False)
class Constant:
    """form: of the names in the file."""

    file: File
    form: str
    blocks: tuple[str, ...]

    name, options, values = "constant", (), 0

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return bool(shapes) and any(all(key.fullmatch(name) for name in shapes) for key in FORMS.values())

    @classmethod
    def read(cls, file: File) -> "Constant":
        form, key = next((form, key) for form, key in FORMS.items() if key.fullmatch(next(iter(file.shapes))))
        blocks = in_order((key.fullmatch(name)[1] for name in file.shapes), file.name)
        shape = next(iter(file.shapes.values()))
        if form.startswith("kv_cache"):
            if len(shape) != 4 or shape[0] != 1 or shape[3] != HEAD:
                raise WrongTemplate(f"{file.name} holds keys of shape {list(shape)}; expected [1, tokens, heads, {HEAD}]")
        elif len(shape) != 2:
            raise WrongTemplate(f"{file.name} holds keys of shape {list(shape)}; expected [tokens, channels]")
        else:
            check_width(file, shape[1])
        check_shapes(file, {form.format(part=part, block=block): shape for part in "kv" for block in blocks})
        return cls(file, form, blocks)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self.file.tensors()

    def entry(self, values: Sequence[float] = ()) -> Entry:
        def part(block: str, name: str) -> Tensor:
            tensor = self.tensors[self.form.format(part=name, block=block)]
            return by_head((tensor if tensor.ndim == 2 else tensor[0].flatten(1)).to(kept_as(tensor.dtype)))

        blocks = {block: (part(block, "k"), part(block, "v")) for block in self.blocks}
        kept = next(iter(blocks.values()))[0].dtype
        return entry_of(blocks, key_of(self.file, "", f"kept as {kept}"), f"template {self.file.name}", "none")
