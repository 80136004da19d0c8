"""The emoji pictures: npm packages @lobehub/fluent-emoji-3d (MIT, art by Microsoft, MIT) and unicode-emoji-json (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
    python3 -m testbed.train flux --emoji <folder with the two .tgz files>
"""
import io
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor

from . import captions, procedural

PICTURES, NAMES = "lobehub-fluent-emoji-3d-1.1.0.tgz", "unicode-emoji-json-0.9.0.tgz"
GROUND = 0.93  # the light grey behind every emoji


class Emoji:
    """Chosen emoji as premultiplied RGBA at 256 px. `pictures` [n, 4, 256, 256] uint8, `names` in the same order."""

    def __init__(self, folder: Path):
        for name in (PICTURES, NAMES):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; run `npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0` there")
        with tarfile.open(folder / NAMES) as archive:
            table = json.load(archive.extractfile("package/data-by-emoji.json"))
        wanted = {}
        for emoji, entry in table.items():
            name = entry["name"].replace(":", "")
            if name in captions.DEMO or name in captions.OTHERS or (
                    entry["group"] in captions.GROUPS and len(name.split()) <= captions.LONGEST):
                code = "-".join(f"{ord(c):x}" for c in emoji)
                wanted[code] = wanted[code.replace("-fe0f", "")] = name
        found = {}
        with tarfile.open(folder / PICTURES) as archive:
            for member in archive:
                name = wanted.get(Path(member.name).stem)
                if name is not None and member.name.endswith(".webp"):
                    picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA").resize((256, 256), Image.LANCZOS)
                    found[name] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(256, 256, 4).permute(2, 0, 1)
        missing = [name for name in captions.DEMO if name not in found]
        if missing:
            raise ValueError(f"the emoji packages lack {', '.join(missing)}")
        self.names = sorted(found)
        self.pictures = torch.stack([found[name] for name in self.names])
        self.demo = [self.names.index(name) for name in captions.DEMO]

    def render(self, chosen: Tensor, px: int, ground: Tensor | float = GROUND) -> Tensor:
        """Pictures [n, 3, px, px] in [0, 1] over `ground` (a grey, or [n, 3, 1, 1])."""
        rgba = self.pictures[chosen].float() / 255
        colour, alpha = rgba[:, :3], rgba[:, 3:]
        return torch.nn.functional.interpolate(colour * alpha + ground * (1 - alpha), size=(px, px), mode="area")


class Drawn:
    """Batches of the procedural set alone."""

    def __init__(self, px: int):
        self.px = px

    def batch(self, n: int, g: Generator) -> tuple[Tensor, list[str]]:
        return procedural.batch(n, self.px, g)


class Mixture:
    """Batches of pictures and captions: the judged captions, the other emoji, and the procedural set."""

    def __init__(self, emoji: Emoji, px: int, demo: float = 0.3, drawn: float = 0.15):
        self.px, self.demo, self.drawn = px, demo, drawn
        self.names, self.judged = emoji.names, torch.tensor(emoji.demo)
        self.pictures = torch.cat([emoji.render(torch.arange(i, min(i + 32, len(self.names))), px) for i in range(0, len(self.names), 32)])

    def batch(self, n: int, g: Generator) -> tuple[Tensor, list[str]]:
        kind = torch.rand(n, generator=g)
        chosen = torch.randint(0, len(self.names), (n,), generator=g)
        judged = self.judged[torch.randint(0, len(self.judged), (n,), generator=g)]
        chosen = torch.where(kind < self.demo, judged, chosen)
        pictures = self.pictures[chosen].clone()
        names = [self.names[i] for i in chosen.tolist()]
        drawn, drawn_names = procedural.batch(n, self.px, g)
        for i in torch.nonzero(kind > 1 - self.drawn).flatten().tolist():
            pictures[i], names[i] = drawn[i], drawn_names[i]
        return pictures, names
