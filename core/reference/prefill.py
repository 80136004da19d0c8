"""Keys and values of tokens that see one another and nothing else, from the blocks of a FLUX-like network themselves.

A block runs as the host wrote it, with the reference's tokens in the place of the image's. A double-stream block wants text
beside them: one token of zeros, which sees the reference and is seen by nobody, and whose output is dropped.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor, nn

Put = Callable[[str, Tensor, Tensor], None]
Taps = Callable[[str, nn.Module], Iterator[tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]]


@dataclass
class Capture:
    """An `attn1_patch` that takes the reference's K, not yet rotated, and V, and hides the `hidden` tokens in front of them."""

    put: Put
    name: str = ""
    hidden: int = 0

    def __call__(self, q, k, v, pe=None, **others):
        k, v = k[:, :, self.hidden:], v[:, :, self.hidden:]
        self.put(self.name, k, v)
        return {"q": apply_rope1(q, pe), "k": apply_rope1(k, pe[:, :, self.hidden:]), "v": v, "pe": None}


def vector(network, time: float, guidance: float | None, pooled: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What modulates at this time, [1, C], as FLUX adds it up."""
    def embedded(value: float) -> Tensor:
        return timestep_embedding(torch.tensor([value], device=device), 256).to(dtype)

    vec = network.time_in(embedded(time))
    if network.params.guidance_embed and guidance is not None:
        vec = vec + network.guidance_in(embedded(guidance))
    if network.vector_in is not None:
        width = network.params.vec_in_dim
        vec = vec + network.vector_in(torch.zeros((1, width), dtype=dtype, device=device) if pooled is None else pooled[:, :width].to(device, dtype))
    return vec


def prefill(network, patches: Tensor, ids: Tensor, vec: Tensor, put: Put, options: dict, taps: Taps = lambda name, block: ()) -> None:
    """patches: [1, T, in channels]; ids: [T, axes]; vec: [1, C].

    taps: for a block, the linear layers whose output is changed in passing, each with (input, output) -> output.
    """
    device = patches.device
    image = network.img_in(patches)
    text = image.new_zeros((1, 1, image.shape[-1]))
    code = network.pe_embedder(ids[None].to(device))
    both = torch.cat([network.pe_embedder(ids.new_zeros((1, 1, ids.shape[1])).to(device)), code], dim=2)
    capture = Capture(put)
    options = {**options, "patches": {"attn1_patch": [capture]}, "patches_replace": {}}
    double = single = vec
    if network.params.global_modulation:
        double = (network.double_stream_modulation_img(vec), network.double_stream_modulation_txt(vec))
        single, _ = network.single_stream_modulation(vec)
    capture.hidden = text.shape[1]
    for i, block in enumerate(network.double_blocks):
        capture.name = f"double.{i}"
        with tapped(taps(capture.name, block)):
            image, _ = block(img=image, txt=text.clone(), vec=double, pe=both, transformer_options={**options, "block_type": "double", "block_index": i})
    capture.hidden = 0
    for i, block in enumerate(network.single_blocks):
        capture.name = f"single.{i}"
        with tapped(taps(capture.name, block)):
            image = block(image, vec=single, pe=code, transformer_options={**options, "block_type": "single", "block_index": i})


@contextmanager
def tapped(taps):
    """The output of these layers changed, for as long as the block runs."""
    with ExitStack() as stack:
        for layer, change in taps:
            handle = layer.register_forward_hook(lambda module, args, output, change=change: change(args[0], output))
            stack.callback(handle.remove)
        yield
