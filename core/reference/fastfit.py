"""FastFit: garments for virtual try-on, each seen by the person in self-attention and by nobody else.

    reference i   Attn(Q(R_i), K(R_i), V(R_i))
    person        Attn(Q(X), [K(X); K(R_1); ...; K(R_n)], [V(X); V(R_1); ...; V(R_n)])

A reference is embedded by its class where the person is by the time, and self-attention has no position code. So its K and V
hang on its latent, its class and the weights alone: not on step, seed, person, mask, size of the picture or other garments.
The negative sees null references: latents of zeros, of the same size and class.
Written from Chong et al., "FastFit: Accelerating Multi-Reference Virtual Try-On via Cacheable Diffusion Models", arXiv 2508.20586.
"""
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .entry import EXACT, Key, fingerprint
from .handle import Facts
from .inputs import check_latent
from .prefill import Put
from .unet_attention import CapturedAttention
from .unet_blocks import attention_blocks, entry_bytes, halvings, level_tokens, name_of

CLASSES = ("upper", "lower", "overall", "shoe", "bag")      # in the order of the checkpoint's embedding


@dataclass(frozen=True, eq=False)
class FastFitReference:
    """A recipe: latent [1, 4, h, w] as the VAE gives it, and class of a garment. null: what stands for it where it is to have no say."""

    latent: Tensor
    label: str
    null: bool = False
    content: str = field(default="", init=False)

    seam, exactness, rope, family = "unet", EXACT, "none", "fastfit"

    def __post_init__(self):
        if self.label not in CLASSES:
            raise ValueError(f"the class of a garment is '{self.label}'; choose one of {', '.join(CLASSES)}")
        check_latent(self.latent, "garment's latent", vae="the VAE of SD 1.5")
        if self.latent.shape[0] != 1:
            raise ValueError(f"a FastFit reference has one latent of 4 channels and a tensor of shape {list(self.latent.shape)} came; "
                             "give one image for each reference and encode it with the VAE of SD 1.5")
        if self.null:
            object.__setattr__(self, "latent", torch.zeros_like(self.latent))
        object.__setattr__(self, "content", fingerprint(self.latent))

    @property
    def source(self) -> str:
        height, width = self.size
        return f"FastFit {self.label}{', null' if self.null else ''}, {width * 8} x {height * 8}"

    @property
    def size(self) -> tuple[int, int]:
        return self.latent.shape[-2], self.latent.shape[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        return level_tokens(*self.size)

    def unfit(self, network) -> str:
        if not (hasattr(network, "condition_conv_in") and hasattr(network, "class_embedding")):
            return f"a FastFit reference ({self.label}) came to a {type(network).__name__}, which is no FastFit model; load one with the FastFit Loader"
        known, channels = network.class_embedding.num_embeddings, network.condition_conv_in.in_channels
        if CLASSES.index(self.label) >= known:
            return f"the FastFit checkpoint knows the classes {', '.join(CLASSES[:known])} and a reference is of class {self.label}; choose one that it knows"
        if self.latent.shape[1] != channels:
            return f"the FastFit model takes latents of {channels} channels and a reference has {self.latent.shape[1]}; encode it with the VAE of SD 1.5"
        if min(self.size) < (least := 2 ** halvings(network)):
            return (f"a garment of {self.size[1] * 8} x {self.size[0] * 8} pixels came and the FastFit model halves it to less than nothing; give it "
                    f"{least * 8} x {least * 8} or more, best a height of 512")
        return ""

    def bytes(self, network, dtype: torch.dtype) -> int:
        return entry_bytes(network, *self.size, dtype)

    def key(self, facts: Facts) -> Key:
        return Key({"system": "fastfit 1", "content": self.content, "class": self.label, "base": facts.base, "numerics": str(facts.dtype)}, facts.lasting)

    def ready(self, facts: Facts) -> None:
        return None

    def fill(self, facts: Facts, put: Put) -> None:
        """The network's own forward, with nobody's patches and wrappers but those that read K and V."""
        network = facts.network
        latent = self.latent.to(facts.device, torch.float32)
        latent = (latent if self.null else facts.model.process_latent_in(latent)).to(facts.dtype)
        reading = {place: CapturedAttention(name_of(place), put) for place, _, _ in attention_blocks(network, *self.size)}
        options = {**facts.options, "wrappers": {}, "patches": network.as_reference(CLASSES.index(self.label)), "patches_replace": {"attn1": reading}}
        network(latent, torch.zeros(1, device=latent.device), transformer_options=options)

    def odd(self, recipes) -> str:
        labels = {getattr(recipe, "label", None) for recipe in recipes} & set(CLASSES)
        beside = [label for label in ("upper", "lower") if label in labels]
        if self.label != "overall" or not beside:
            return ""
        return f"a garment 'overall' beside '{beside[0]}' is no outfit that FastFit was trained with, so take one of the two away"

    def other_side(self) -> "FastFitReference":
        return self if self.null else self.nothing

    @cached_property
    def nothing(self) -> "FastFitReference":
        return replace(self, null=True)
