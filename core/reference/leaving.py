"""How reference tokens leave the sequence of a family's model, and how its attention still reads them.

FLUX, Qwen-Image, Krea 2: the reference latents are left out of the call, so no token is made of them. K and V were taken in
`attn1_patch`, before the rotation, and go back in there, with their own position code behind that of the model.

Z-Image Omni (NextDiT): text and image of the picture are placed behind those of the references, and refiners join them, so the
call stays as it is up to the main layers. There the tokens that the host modulates at t = 0 are cut out, and back in, as zeros
that nobody reads, before the host looks for the image at the sequence's end. K and V are taken after the rotation.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..families import Family
from ..memory import image_tokens
from .join import AttentionPatch, Buffers, Mismatch, Segment
from .kept import Taking

LATENTS = "ref_latents"     # the host's name in a model call
Seen = tuple[dict, dict]    # options and further arguments of a model call


class Leaving(Protocol):
    """What a family knows of its reference tokens."""

    def unfit(self, network, options: dict) -> str:
        """Why these references must stay in the sequence, in a sentence; nothing where they may leave."""

    def names(self, network) -> list[str]:
        """Of the blocks whose attention reads reference tokens."""

    def width(self, network) -> int:
        """Channels of K of one token, all heads together."""

    def tokens(self, network, cond: dict) -> int:
        """Reference tokens of one of the host's conditions."""

    def taken(self, network, options: dict, extra: dict, taking: Taking):
        """A context with the call's options and arguments, in which a full call gives K and V to `taking`."""

    def frozen(self, network, options: dict, extra: dict, segment: Segment, buffers: Buffers):
        """A context with the call's options and arguments, in which a call runs without reference tokens and attends to the segment's."""


@dataclass(frozen=True)
class ByPatch:
    """References follow the image tokens, and `attn1_patch` sees K before it is rotated.

    stacks: as {block type: the network's list of blocks}.
    mask: the host makes its attention mask before the patches run and hears nothing from them of it.
    """

    stacks: dict[str, str]
    channels: Callable[[object], int]
    patch: str = "patch_size"
    mask: bool = False

    def unfit(self, network, options: dict) -> str:
        return ""

    def names(self, network) -> list[str]:
        return [f"{kind}.{i}" for kind, stack in self.stacks.items() for i in range(len(getattr(network, stack)))]

    def width(self, network) -> int:
        return self.channels(network)

    def tokens(self, network, cond: dict) -> int:
        return sum(image_tokens(latent.shape, getattr(network, self.patch)) for latent in cond["reference_latents"])

    @contextmanager
    def taken(self, network, options: dict, extra: dict, taking: Taking) -> Iterator[Seen]:
        tap, patches = Tap(taking), options.get("patches", {})
        both = {"post_input": [tap.positions, *patches.get("post_input", ())], "attn1_patch": [*patches.get("attn1_patch", ()), tap.attention]}
        yield {**options, "patches": {**patches, **both}}, extra

    @contextmanager
    def frozen(self, network, options: dict, extra: dict, segment: Segment, buffers: Buffers) -> Iterator[Seen]:
        patches = options.get("patches", {})
        patch = (Unmasked if self.mask else AttentionPatch)([segment], buffers, network.pe_embedder)
        options = {**options, "patches": {**patches, "attn1_patch": [*patches.get("attn1_patch", ()), patch]}}
        if self.mask:
            options["optimized_attention_override"] = LaterMask(options.get("optimized_attention_override"))
        yield options, {name: value for name, value in extra.items() if name != LATENTS}


@dataclass
class Tap:
    """Takes the reference tokens of a full call, which are the last ones of the image stream, and changes nothing."""

    taking: Taking
    image: int = -1     # tokens of the image stream, references included

    def positions(self, inputs: dict) -> dict:
        """For `post_input`, before the patches that are there."""
        tokens = sum(inputs["transformer_options"].get("reference_image_num_tokens", ()))
        self.image, self.taking.ids = inputs["img"].shape[1], inputs["img_ids"][:, inputs["img_ids"].shape[1] - tokens:].clone()
        return inputs

    def attention(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **others) -> dict:
        begin, end = extra_options["img_slice"]
        tokens = sum(extra_options.get("reference_image_num_tokens", ()))
        if end - begin == self.image and k.shape[2] >= end:     # another patch may have put tokens behind the references, or K behind all
            self.taking.put(f"{extra_options['block_type']}.{extra_options['block_index']}", k[:, :, end - tokens:end], v[:, :, end - tokens:end])
        return {}


class Unmasked(AttentionPatch):
    """Where the host shows its patches something else as the mask."""

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **others):
        out = super().__call__(q, k, v, pe=pe, extra_options=extra_options)
        return {name: out[name] for name in ("q", "k", "v", "pe")}


@dataclass
class LaterMask:
    """An `optimized_attention_override` that makes a mask as long as K, and lets the tokens behind it be seen."""

    previous: Callable | None = None

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        if mask is not None and mask.shape[-1] < k.shape[2]:
            more = mask.new_zeros((*mask.shape[:-1], k.shape[2] - mask.shape[-1]))
            mask = torch.cat([mask, ~more if mask.dtype == torch.bool else more], -1)
        return attend(self.previous, func, q, k, v, heads, mask, *args, **kwargs)


def attend(previous: Callable | None, func, *args, **kwargs):
    """The host's attention, by way of the override that was there."""
    return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)


@dataclass(frozen=True)
class ByLayers:
    """NextDiT."""

    def unfit(self, network, options: dict) -> str:
        if not hasattr(network, "final_layer"):
            return "Z-Image in pixel space looks for the image tokens by itself"
        if options.get("patches", {}).get("double_block"):
            return "a patch between the blocks, as of a ControlNet, counts on all tokens"
        return ""

    def names(self, network) -> list[str]:
        return [f"layer.{i}" for i in range(len(network.layers))]

    def width(self, network) -> int:
        return network.dim

    def tokens(self, network, cond: dict) -> int:
        """Each reference is its text, what a vision encoder saw of it, and its latent; the picture too has a place for the second."""
        latents, texts = cond["reference_latents"], cond.get("reference_latents_text_embeds") or ()
        counts = [image_tokens(latent.shape, network.patch_size) for latent in latents]
        counts += [texts[i].shape[1] if i < len(texts) else 1 for i in range(len(latents))]
        if network.siglip_embedder is not None:
            seen = cond.get("clip_vision_outputs") or [part.get("clip_vision_output") for part in cond.get("unclip_conditioning", ())]
            seen = [vision.last_hidden_state.shape[1] for vision in seen if vision is not None][:len(latents)]
            counts += seen + [1] * (len(latents) + 1 - len(seen))
        multiple = network.pad_tokens_multiple or 1
        return sum(-(-count // multiple) * multiple for count in counts)

    @contextmanager
    def taken(self, network, options: dict, extra: dict, taking: Taking) -> Iterator[Seen]:
        with Layers(options.get("optimized_attention_override"), taking=taking).on(network) as layers:
            yield {**options, "optimized_attention_override": layers.attention}, extra

    @contextmanager
    def frozen(self, network, options: dict, extra: dict, segment: Segment, buffers: Buffers) -> Iterator[Seen]:
        with Layers(options.get("optimized_attention_override"), segment=segment, buffers=buffers).on(network) as layers:
            yield {**options, "optimized_attention_override": layers.attention}, extra


@dataclass
class Layers:
    """One call of NextDiT's main layers. With `taking` the tokens at t = 0 give K and V; with `segment` they are left out."""

    previous: Callable | None
    taking: Taking | None = None
    segment: Segment | None = None
    buffers: Buffers | None = None
    name: str = ""      # of the layer that runs; the refiners before them have none
    total: int = 0
    noisy: Sequence[tuple[int, int]] = ()   # where the tokens of the picture and its text are
    codes: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def on(self, network) -> Iterator["Layers"]:
        with ExitStack() as stack:
            for i, layer in enumerate(network.layers):
                stack.callback(layer.register_forward_pre_hook(partial(self.enter, i), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self.leave).remove)
            if self.segment is not None:
                stack.callback(network.final_layer.register_forward_pre_hook(self.end, with_kwargs=True).remove)
                stack.callback(network.final_layer.register_forward_hook(self.whole).remove)
            yield self

    def enter(self, i: int, layer, args: tuple, kwargs: dict):
        x, mask, code, *rest = args
        if i == 0:
            slices = kwargs.get("timestep_zero_index")
            if not slices or mask is not None:
                raise Mismatch("the layers of NextDiT are not called as with references at t = 0")
            self.total, self.noisy = x.shape[1], sorted(slices)
        self.name = f"layer.{i}"
        if self.segment is None:
            return None
        if self.codes is None or self.codes[0] is not code:
            self.codes = (code, self.cut(code))
        return (self.cut(x) if i == 0 else x, mask, self.codes[1], *rest), {**kwargs, "timestep_zero_index": [(0, self.count)]}

    def leave(self, *_) -> None:
        self.name = ""

    def attention(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        if self.name and self.taking is not None:
            clean = self.clean
            self.taking.put(self.name, *(torch.cat([part[:, :, begin:end] for begin, end in clean], 2) for part in (k, v)))
        elif self.name:
            pairs = self.segment.block(self.name)
            k, v = (self.buffers.joined(role, own, [[pair[i] for pair in pairs]]) for i, (role, own) in enumerate((("k", k), ("v", v))))
        return attend(self.previous, func, q, k, v, heads, mask, *args, **kwargs)

    def end(self, layer, args: tuple, kwargs: dict):
        return args, {**kwargs, "timestep_zero_index": [(0, self.count)]}

    def whole(self, layer, args: tuple, output: Tensor) -> Tensor:
        full, begun = output.new_zeros((output.shape[0], self.total, output.shape[2])), 0
        for begin, end in self.noisy:
            full[:, begin:end] = output[:, begun:begun + end - begin]
            begun += end - begin
        return full

    def cut(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, begin:end] for begin, end in self.noisy], 1)

    @property
    def count(self) -> int:
        return sum(end - begin for begin, end in self.noisy)

    @property
    def clean(self) -> list[tuple[int, int]]:
        edges = [0, *(edge for part in self.noisy for edge in part), self.total]
        return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]


LEAVING: dict[str, Leaving] = {
    "flux": ByPatch({"double": "double_blocks", "single": "single_blocks"}, lambda network: network.hidden_size),
    "qwen_image": ByPatch({"double": "transformer_blocks"}, lambda network: network.inner_dim, mask=True),
    "krea2": ByPatch({"single": "blocks"}, lambda network: network.blocks[0].attn.kvheads * network.blocks[0].attn.headdim, patch="patch"),
    "nextdit": ByLayers(),
}


def leaving(family: Family | None) -> Leaving | None:
    return None if family is None else LEAVING.get(family.name)
