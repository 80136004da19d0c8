"""Reference latents as a checkpoint trained for caching takes them: clean, and blind to all but one another.

    R = [R_1 ; ... ; R_n]                              modulated at t = 0, R_i at place i * scale of the first axis
    Attn(Q(R), K(R), V(R))                             references see references, all of them jointly
    Attn(Q(X), [K(X) ; K(R)], [V(X) ; V(R)])           text and image see everything

No query of a reference reads noise or text and no step modulates it, so K and V are the same on every step, for every seed
and prompt. FLUX.2-klein-9b-KV of Black Forest Labs is trained so. Its weights have the names and shapes of the ordinary
FLUX.2-klein-9b, so nothing in a file tells the two apart: on any other FLUX.2 this is a function that it was not trained for.
"""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .entry import EXACT, Key, fingerprint
from .handle import Facts
from .prefill import Put, prefill, vector

BY_INDEX = ("index", "index_timestep_zero")


@dataclass(frozen=True, eq=False)
class JointLatents:
    """A recipe: the latents [1, C, h, w] of all references of one condition, in their order, as the VAE gives them.

    tokens: of all of them together, which is known where the network's patch size is.
    """

    latents: tuple[Tensor, ...]
    tokens: int
    content: str = field(default="", init=False)

    seam, exactness, rope, family, hangs_on = "flux", EXACT, "pre", "flux2", ("guidance",)

    def __post_init__(self):
        object.__setattr__(self, "content", fingerprint(*self.latents))

    @property
    def source(self) -> str:
        return "1 reference latent" if len(self.latents) == 1 else f"{len(self.latents)} reference latents"

    def unfit(self, network) -> str:
        return not_joint(network)

    def bytes(self, network, dtype: torch.dtype) -> int:
        blocks = len(network.double_blocks) + len(network.single_blocks)
        return blocks * self.tokens * network.hidden_size * 2 * dtype.itemsize + self.tokens * len(network.params.axes_dim) * 4

    def key(self, facts: Facts) -> Key:
        params = facts.network.params
        return Key({
            "system": "reference latents 1", "content": self.content, "base": facts.base, "numerics": str(facts.dtype),
            "guidance": repr(facts.guidance) if params.guidance_embed else "", "position": repr(facts.options.get("rope_options")),
        }, facts.lasting)

    def ready(self, facts: Facts) -> None:
        return None

    def fill(self, facts: Facts, put: Put) -> Tensor:
        network, pieces = facts.network, []
        for i, latent in enumerate(self.latents, 1):
            latent = facts.model.process_latent_in(latent.to(facts.device, torch.float32)).to(facts.dtype)
            pieces.append(network.process_img(latent, index=i * network.params.ref_index_scale, transformer_options=facts.options))
        patches, ids = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
        vec = vector(network, 0.0, facts.guidance, None, facts.dtype, facts.device)
        prefill(network, patches, ids[0], vec, put, facts.options)
        return ids[0]

    def other_side(self) -> None:
        return None


def not_joint(network) -> str:
    """Why no reference of this network can be cached exactly; nothing where one may be."""
    params = getattr(network, "params", None)
    if params is None or not hasattr(network, "double_blocks") or not getattr(params, "global_modulation", False) or network.vector_in is not None:
        kind = type(network).__name__
        return f"mode 'exact' is for FLUX.2 checkpoints that were trained for it and the model is a {kind} of another kind; choose mode 'freeze'"
    return ""


def unplaced(latents, method: str | None, default: str) -> str:
    """Why references of one condition cannot be placed the way that joint latents are; nothing where they can."""
    if any(latent.ndim != 4 or latent.shape[0] != 1 for latent in latents):
        shape = "x".join(str(size) for size in next(latent for latent in latents if latent.ndim != 4 or latent.shape[0] != 1).shape)
        return f"a reference latent of shape {shape} came and mode 'exact' expects one picture each; give every picture a Set Reference Latent of its own"
    if not all(latent.isfinite().all() for latent in latents):
        return "a reference latent has values that are no numbers; mend what made it, a VAE in 16 bits for example"
    method = method or default
    if method not in BY_INDEX:
        return f"the references are placed by '{method}' and mode 'exact' expects 'index'; choose it in Edit Model Reference Method, or mode 'freeze'"
    return ""
