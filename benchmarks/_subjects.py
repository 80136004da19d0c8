"""What the grid samples: models of the test bed, and two sets of pictures for each that have none in common."""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ._pictures import DRAWN, MODELS, Subject, conditions
from testbed import procedural, tiny

SAMPLERS = ("euler", "dpmpp_2m")
STEPS = (20, 28, 50)
SEEDS = 2
CHOOSE, SCORE = "choose", "score"       # the two sets
PEERS = "peers"                         # the first set of FLUX, on which other step caches were measured elsewhere


@dataclass(frozen=True)
class Pictures:
    """What a model is asked for: conditions with a row per picture, and noise."""

    conds: tuple[list, list]
    noise: Tensor
    prompts: int
    seeds: int

    def one(self, i: int) -> "Pictures":
        def row(entries):
            return [[text[i:i + 1], {key: value[i:i + 1] if torch.is_tensor(value) else value for key, value in more.items()}]
                    for text, more in entries]

        return Pictures(tuple(row(entries) for entries in self.conds), self.noise[i:i + 1], 1, 1)


def noise_of(shape: tuple[int, ...], prompt: int, seed: int) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(1000 + 10 * prompt + seed))


@dataclass(frozen=True)
class Trained:
    """A trained model of the test bed, with captions for both sets, decoded by the linear VAE."""

    subject: Subject
    captions: dict[str, tuple[str, ...]]
    decodes, samplers, steps = True, SAMPLERS, STEPS

    @property
    def name(self) -> str:
        return self.subject.name

    def load(self):
        return self.subject.load()

    def fingerprint(self) -> str:
        return hashlib.sha256((MODELS / self.subject.file).read_bytes()).hexdigest()[:12]

    def pictures(self, which: str, prompts: int) -> Pictures:
        chosen, before = self.captions[which][:prompts], len(self.captions[CHOOSE]) * (which == SCORE)
        noise = [noise_of((16, 16, 16), before + i, seed) for i in range(len(chosen)) for seed in range(SEEDS)]
        return Pictures(conditions([caption for caption in chosen for _ in range(SEEDS)]), torch.cat(noise), len(chosen), SEEDS)


@dataclass(frozen=True)
class Seeded:
    """A model of random weights: latents alone, as there is nothing to see in them."""

    kind: str
    name: str
    frames: int = 3
    decodes, samplers, steps = False, SAMPLERS[:1], STEPS[:1]     # for the meaning of a tolerance alone, as there is nothing to see

    def load(self):
        return tiny.patcher(self.kind)

    def fingerprint(self) -> str:
        return hashlib.sha256(Path(tiny.__file__).read_bytes()).hexdigest()[:12]

    def pictures(self, which: str, prompts: int) -> Pictures:
        numbers = [prompt + 8 * (which == SCORE) for prompt in range(prompts)]
        shape = (tiny.KINDS[self.kind].channels, self.frames, 8, 8)
        noise = [noise_of(shape, number, seed) for number in numbers for seed in range(SEEDS)]
        positive = torch.cat([tiny.conditioning(self.kind, 11 + number)[0][0] for number in numbers for _ in range(SEEDS)])
        return Pictures(([[positive, {}]], [[torch.zeros_like(positive), {}]]), torch.cat(noise), len(numbers), SEEDS)


def drawn(seed: int) -> tuple[str, ...]:
    return tuple(procedural.caption(row) for row in procedural.sample_attributes(8, torch.Generator().manual_seed(seed)).tolist())


SUBJECTS = {
    "flux": Trained(Subject("tiny_flux_trained128.safetensors", DRAWN), {CHOOSE: DRAWN, SCORE: drawn(778), PEERS: DRAWN}),
    "zimage": Trained(Subject("tiny_z_image_trained128.safetensors", DRAWN, shift=3.0), {CHOOSE: DRAWN, SCORE: drawn(778)}),
    "wan": Seeded("wan", "wan, seeded"),
}
