"""EasyControl: a condition image as a third stream of FLUX.1, with LoRA of its own on the image stream's weights.

    q = Wq h + bq + s up_q(down_q(h)),  k and v alike         in double- and single-stream blocks
    o = o + s up_o(down_o(o)),  o = Wo a + bo                  in double-stream blocks: on the OUTPUT of the projection

A condition is modulated at t = 0 and sees itself alone; text and image see every condition. Nothing of it depends on the
step, so its K and V are encoded once, and its tokens pass no linear layer after that.
Spatial conditions lie stretched over the picture's grid, subjects 64 rows below it.
From Zhang et al., "EasyControl: Adding Efficient and Flexible Control for Diffusion Transformer", arXiv 2503.07027.
"""
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux.model import Flux
from comfy.utils import common_upscale
from torch import Tensor

from ..knob import shown
from .entry import EXACT, Key, fingerprint
from .handle import Facts
from .inputs import check_latent, image_of
from .prefill import Put, prefill, vector
from .told import many
from .weights import check_weights

KINDS = ("spatial", "subject")
SUBJECT_OFFSET = 64     # rows of tokens, published
CHANNELS = 16       # of FLUX.1's latents
KEY = re.compile(r"(single_)?transformer_blocks\.(\d{1,4})\.attn\.processor\.(q|k|v|proj)_loras\.(\d{1,9})\.(down|up)\.weight")
SIBLING = "cond_lora_qkv."      # of an adapter for Anima / Cosmos that shares the name


class WrongFile(ValueError):
    """A file that is no EasyControl adapter."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """slots: for each, {"double.0": {"q": (down [r, C], up [C, r]), ...}}; digest: of the file."""

    slots: tuple[Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], ...]
    digest: str
    name: str

    @property
    def width(self) -> int:
        return self.slots[0]["double.0"]["q"][0].shape[1]

    @property
    def depth(self) -> tuple[int, int]:
        """Double- and single-stream blocks."""
        names = self.slots[0]
        return sum(name.startswith("double") for name in names), sum(name.startswith("single") for name in names)


def read_adapter(tensors: Mapping[str, Tensor], digest: str, name: str) -> Adapter:
    """From the tensors of a published file; a WrongFile says what is not as it should be."""
    if any(key.startswith(SIBLING) for key in tensors):
        raise WrongFile(f"{name} is an EasyControl adapter for Anima or Cosmos; expected one for FLUX.1, with keys such as "
                        "transformer_blocks.0.attn.processor.q_loras.0.down.weight")
    halves: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise WrongFile(f"{name} has the key {shown(key)!r}, which no EasyControl adapter has; choose a file such as canny.safetensors of EasyControl")
        single, index, part, slot, half = match.groups()
        halves.setdefault((int(slot), f"{'single' if single else 'double'}.{int(index)}", part), {})[half] = tensor
    if not halves:
        raise WrongFile(f"{name} has no tensors; expected an EasyControl adapter for FLUX.1")
    numbers = {slot for slot, _, _ in halves}
    if max(numbers) >= len(numbers):
        raise WrongFile(f"{name} has {many(len(numbers), 'slot', 'slots')} and numbers them up to {max(numbers)}; expected slots from 0 on, none left out; "
                        "download it again")
    check_weights(tensors, name)
    slots: list[dict[str, dict]] = [{} for _ in numbers]
    width = None
    for (slot, block, part), pair in halves.items():
        if set(pair) != {"down", "up"}:
            raise WrongFile(f"{name} has only the {next(iter(pair))} half of {part} in block {block}; the file is not whole, download it again")
        down, up = pair["down"], pair["up"]
        width = width or (down.shape[1] if down.ndim == 2 else 0)
        if down.ndim != 2 or up.ndim != 2 or down.shape[1] != width or tuple(up.shape) != (width, down.shape[0]):
            raise WrongFile(f"{name}: {part} in block {block} is {tuple(down.shape)} and {tuple(up.shape)}; expected [rank, {width}] and [{width}, rank]")
        slots[slot].setdefault(block, {})[part] = (down, up)
    blocks = set(slots[0])
    for slot, found in enumerate(slots):
        if set(found) != blocks:
            raise WrongFile(f"{name}: slot {slot} has other blocks than slot 0; the file is not whole, download it again")
        for block, parts in found.items():
            wanted = {"q", "k", "v", "proj"} if block.startswith("double") else {"q", "k", "v"}
            if set(parts) != wanted:
                raise WrongFile(f"{name}: block {block} has {', '.join(sorted(parts))}; expected {', '.join(sorted(wanted))}")
    adapter = Adapter(tuple(slots), digest, name)
    numbered = {f"{kind}.{i}" for kind, count in zip(("double", "single"), adapter.depth, strict=True) for i in range(count)}
    if blocks != numbered or not adapter.depth[0]:
        raise WrongFile(f"{name} leaves out blocks between those it has; the file is not whole, download it again")
    return adapter


def prepared(image: Tensor, kind: str, size: int, padding: float) -> Tensor:
    """image: [B, H, W, 3], of which the first counts, to [1, size, size, 3]: squashed, or for a subject fitted and padded around."""
    picture = image_of(image)[:1].movedim(-1, 1)
    if kind == "spatial":
        return common_upscale(picture, size, size, "bicubic", "disabled").clamp(0, 1).movedim(1, -1)
    height, width = picture.shape[-2:]
    fitted = [max(1, round(side * size / max(height, width))) for side in (height, width)]
    inside = common_upscale(picture, fitted[1], fitted[0], "bicubic", "disabled").clamp(0, 1)
    out = torch.full((1, 3, size, size), padding, dtype=picture.dtype)
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    out[:, :, top:top + fitted[0], left:left + fitted[1]] = inside
    return out.movedim(1, -1)


@dataclass(frozen=True, eq=False)
class EasyControl:
    """A recipe: adapter, slot and the condition's latent [1, C, h, w] as the VAE gives it."""

    adapter: Adapter
    latent: Tensor
    kind: str = "spatial"
    strength: float = 1.0
    slot: int = 0
    content: str = field(default="", init=False)

    seam, exactness, rope, family = "flux", EXACT, "pre", "flux"

    @property
    def hangs_on(self) -> tuple[str, ...]:
        return ("pooled", "guidance", "size") if self.kind == "spatial" else ("pooled", "guidance")

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is '{self.kind}'; choose one of {', '.join(KINDS)}")
        if not 0 <= self.slot < len(self.adapter.slots):
            raise ValueError(f"slot {self.slot} was asked of {self.adapter.name}, which has {len(self.adapter.slots)}, counted from 0; "
                             "give every condition a slot that the adapter has")
        check_latent(self.latent, "condition's latent", CHANNELS, "FLUX's VAE")
        object.__setattr__(self, "content", fingerprint(self.latent))

    @property
    def source(self) -> str:
        return f"EasyControl {self.adapter.name}, {self.kind}, {self.latent.shape[-1] * 8} x {self.latent.shape[-2] * 8}"

    def grid(self, patch: int = 2) -> tuple[int, int]:
        return -(-self.latent.shape[-2] // patch), -(-self.latent.shape[-1] // patch)

    @property
    def tokens(self) -> int:
        rows, columns = self.grid()
        return rows * columns

    def unfit(self, network) -> str:
        kind = type(network).__name__
        if not isinstance(network, Flux):       # Chroma and HunyuanVideo have blocks of the same names, and parameters of others
            return f"{self.adapter.name} is an EasyControl adapter for FLUX.1 and the model is {kind}; load a FLUX.1-dev model of the host's own loaders"
        params = network.params
        if params.global_modulation or network.vector_in is None or network.patch_size != 2:
            return f"{self.adapter.name} is an EasyControl adapter for FLUX.1 and the model is another FLUX; load FLUX.1-dev"
        if (params.hidden_size, len(network.double_blocks), len(network.single_blocks)) != (self.adapter.width, *self.adapter.depth):
            has, wants = (params.hidden_size, len(network.double_blocks), len(network.single_blocks)), (self.adapter.width, *self.adapter.depth)
            return (f"{self.adapter.name} fits a FLUX of {wants[1]} + {wants[2]} blocks of width {wants[0]} and the model has {has[1]} + {has[2]} of width "
                    f"{has[0]}; load FLUX.1-dev, for which EasyControl was made")
        channels = self.latent.shape[1] * network.patch_size ** 2
        if network.in_channels != channels:
            return (f"the model takes {network.in_channels} channels per token and the condition has {channels}; load plain FLUX.1-dev, "
                    "not its Fill, Canny or Depth variants")
        return ""

    def bytes(self, network, dtype: torch.dtype) -> int:
        blocks = len(network.double_blocks) + len(network.single_blocks)
        return blocks * self.tokens * network.hidden_size * 2 * torch.empty(0, dtype=dtype).element_size() + self.tokens * 3 * 4

    def key(self, facts: Facts) -> Key:
        fields = {
            "system": "easycontrol 1", "content": self.content, "adapter": self.adapter.digest, "slot": str(self.slot), "strength": repr(self.strength),
            "base": facts.base, "kind": self.kind, "pooled": fingerprint(facts.pooled), "numerics": str(facts.dtype),
            "guidance": repr(facts.guidance) if facts.network.params.guidance_embed else "",
        }
        if self.kind == "spatial":
            fields["size"] = "x".join(map(str, facts.shape))
        return Key(fields, facts.lasting)

    def ids(self, shape: tuple[int, ...]) -> Tensor:
        """[T, 3], fp32; shape: H and W of the sampled latent."""
        rows, columns = self.grid()
        down, right = torch.arange(rows, dtype=torch.float32), torch.arange(columns, dtype=torch.float32)
        if self.kind == "spatial":
            down, right = down * (shape[0] / self.latent.shape[-2]), right * (shape[1] / self.latent.shape[-1])
        else:
            down = down + SUBJECT_OFFSET
        grid = torch.zeros(rows, columns, 3)
        grid[..., 1], grid[..., 2] = down[:, None], right[None]
        return grid.view(-1, 3)

    def ready(self, facts: Facts) -> None:
        return None

    def fill(self, facts: Facts, put: Put) -> Tensor:
        network = facts.network
        latent = facts.model.process_latent_in(self.latent.to(facts.device, torch.float32)).to(facts.dtype)
        patches, _ = network.process_img(pad_to_patch_size(latent, (network.patch_size, network.patch_size)))
        ids = self.ids(facts.shape)
        vec = vector(network, 0.0, facts.guidance, facts.pooled, facts.dtype, facts.device)
        prefill(network, patches, ids, vec, put, facts.options, self.taps)
        return ids

    def taps(self, name: str, block) -> Iterator[tuple]:
        parts = self.adapter.slots[self.slot][name]
        first, width = (block.img_attn.qkv if name.startswith("double") else block.linear1), self.adapter.width

        def added(x: Tensor, part: str) -> Tensor:
            down, up = (tensor.to(x.device, x.dtype) for tensor in parts[part])
            return self.strength * torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)

        def qkv(x: Tensor, output: Tensor) -> Tensor:
            output = output.clone()
            for i, part in enumerate("qkv"):
                output[..., i * width:(i + 1) * width] += added(x, part)
            return output

        yield first, qkv
        if "proj" in parts:
            yield block.img_attn.proj, lambda x, output: output + added(output, "proj")

    def other_side(self) -> "EasyControl":
        return self
