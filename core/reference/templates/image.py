"""Templates of pictures: ControlNet, Edit, Upscaler, Inpaint. Each is a diffusion model of FLUX.2 klein's own build.

It runs once, at t = 0, on the prompt and the reference pictures at the places t = 10, 20, ..., and what every block
attends to there (K rotated, and V, of text and pictures) is appended to the base model's. It sees no noise, so nothing
of it hangs on the step. Under its host names it is an ordinary model, which the host loads, casts and pages as any other.

The pass is a sampling run of one evaluation at sigma 0, whose noise-free "image" is the first reference; the shift of the
host's own position options gives that its place.
"""
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import comfy.samplers
import comfy.sd
import torch
from comfy.ldm.flux.math import apply_rope
from torch import Tensor

from ...knob import shown
from ..bank import Bank
from ..entry import Entry, fingerprint
from ..injector import BANK
from ..inputs import check_latent
from ..prefill import Put
from ..told import mib
from .base import FLOATS, Shapes, WrongTemplate, check_width, entry_of, in_order, key_of, seen
from .file import File
from .names import CHANNELS, DOUBLE, ONCE, SINGLE, renamed, size, split

log = logging.getLogger("reprise")

SIGN = "transformer_blocks.0.img_to_qkv.weight"
WEIGHTS = {     # as the host's loader of diffusion models has them
    "default": {}, "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn}, "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


@dataclass
class Capture:
    """An `attn1_patch` that turns Q and K itself, takes K and V as attention sees them, and leaves nothing to turn."""

    put: Put

    def __call__(self, q, k, v, pe=None, extra_options=None, **others):
        q, k = apply_rope(q, k, pe)
        self.put(f"{extra_options['block_type']}.{extra_options['block_index']}", k, v)
        return {"q": q, "k": k, "v": v, "pe": None}


@dataclass(frozen=True, eq=False)
class Image:
    """depth: double- and single-stream blocks; text: channels of a token of the prompt; weights: a name of WEIGHTS."""

    file: File
    depth: tuple[int, int]
    width: int
    text: int
    weights: str = "default"

    name, options = "image", ("weights",)
    types = (*FLOATS, "I8", "U8", "F8_E8M0")        # the host's quantized weights too

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return SIGN in shapes

    @classmethod
    def read(cls, file: File, weights: str = "default") -> "Image":
        if weights not in WEIGHTS:
            raise ValueError(f"weight_dtype is '{shown(weights)}'; choose one of {', '.join(WEIGHTS)}")
        if strange := [key for key in file.shapes if split(key) is None]:
            raise WrongTemplate(f"{file.name} has keys that no image template known here has ({seen(strange)}); "
                                "load ControlNet, Edit, Upscaler or Inpaint for FLUX.2 klein")
        blocks = in_order((split(key)[0] for key in file.shapes if split(key)[0]), file.name)
        shapes = {module: file.shapes.get(f"{module}.weight") for module in wanted(blocks)}
        for module, shape in shapes.items():
            if shape is None or ("embedder" in module and len(shape) != 2):
                raise WrongTemplate(f"{file.name} has no matrix {module}.weight; it is not whole, download it again")
        (width, channels), (_, text) = shapes["img_embedder"], shapes["txt_embedder"]
        check_width(file, width)
        if channels != CHANNELS:
            raise WrongTemplate(f"{file.name} reads {channels} channels for a token where FLUX.2 has {CHANNELS}; what the others are is not known here, "
                                "so load ControlNet, Edit, Upscaler or Inpaint for FLUX.2 klein")
        for module, shape in shapes.items():
            if shape != size(module, width, text):
                raise WrongTemplate(f"{file.name}: {module}.weight is {list(shape)} where {list(size(module, width, text))} belongs; "
                                    "load an image template for FLUX.2 klein")
        return cls(file, tuple(sum(block.startswith(kind) for block in blocks) for kind in ("double", "single")), width, text, weights)

    @cached_property
    def patcher(self):
        """The template as the host's model, its weights not yet on the GPU."""
        model = comfy.sd.load_diffusion_model_state_dict(renamed(self.file.tensors(), self.width), model_options=dict(WEIGHTS[self.weights]))
        if model is None or not getattr(getattr(model.model.diffusion_model, "params", None), "global_modulation", False):
            raise WrongTemplate(f"{self.file.name} is not what ComfyUI takes for a FLUX.2 model; load an image template for FLUX.2 klein")
        return model

    def tokens(self, text: Tensor, latents: Sequence[Tensor]) -> int:
        """Of text, as the host pads it, and of the pictures."""
        padded = self.patcher.model.extra_conds(cross_attn=text, noise=latents[0], device=text.device)["c_crossattn"].cond
        return padded.shape[1] + sum(latent.shape[-2] * latent.shape[-1] for latent in latents)

    def bytes(self, text: Tensor, latents: Sequence[Tensor]) -> int:
        """What the entry will take in host memory, known before it is made."""
        item = torch.empty(0, dtype=self.patcher.model.get_dtype_inference()).element_size()
        return sum(self.depth) * self.tokens(text, latents) * self.width * 2 * item

    def entry(self, text: Tensor, latents: Sequence[Tensor], bank: Bank = BANK, tell: Callable[[int], None] = lambda size: None,
              tick: Callable[[], None] = lambda: None) -> Entry:
        """From the bank, or made now; then `tell` hears its bytes before it is made, and `tick` every block.

        text: [1, N, C], a prompt as the text encoder gives it; latents: [1, 128, h, w] each, as the VAE gives them.
        """
        check_latents(latents)
        if text.shape[-1] != self.text:
            raise ValueError(f"a prompt of {text.shape[-1]} channels came and {self.file.name} reads {self.text}; encode the prompt with FLUX.2 klein's "
                             "own text encoder")
        inputs = " ".join(fingerprint(tensor) for tensor in (text, *latents))
        source = f"template {self.file.name}, {', '.join(f'{latent.shape[-1] * 16} x {latent.shape[-2] * 16}' for latent in latents)}"
        key = key_of(self.file, inputs, f"{' '.join(self.file.types)} as {self.weights}")
        held = bank.get(key)
        if held is not None:
            return held
        size, blocks = self.bytes(text, latents), {}
        tell(size)
        log.info(f"Reprise: {source} will take {mib(size)} of host memory")

        def put(name: str, k: Tensor, v: Tensor) -> None:
            blocks[name] = (k.detach().to("cpu", copy=True), v.detach().to("cpu", copy=True))
            tick()

        evaluate(self.patcher, text, latents, Capture(put))
        entry = entry_of(blocks, key, source, "post")
        bank.put(entry)
        return bank.get(key) or entry


def wanted(blocks: Sequence[str]) -> list[str]:
    """All modules of a template with these blocks, as its file names them."""
    each = {"double": ("transformer_blocks", DOUBLE), "single": ("single_transformer_blocks", SINGLE)}
    kinds = [(*each[block.split("_")[0]], block.split("_")[1]) for block in blocks]
    return [f"{stem}.{index}.{module}" for stem, names, index in kinds for module in names] + list(ONCE)


def check_latents(latents: Sequence[Tensor]) -> None:
    if not latents:
        raise ValueError("an image template wants a picture; connect an image and FLUX.2's VAE, or a latent")
    for latent in latents:
        check_latent(latent, channels=CHANNELS, vae="FLUX.2's VAE")


def evaluate(patcher, text: Tensor, latents: Sequence[Tensor], capture: Capture) -> None:
    """One evaluation of the model at sigma 0, through the host's own sampling: loading, casting, padding of text, interrupts."""
    def once(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        denoise(x, sigmas[:1], **(extra_args or {}))
        return x

    clone = patcher.clone()
    clone.set_model_attn1_patch(capture)
    clone.model_options["transformer_options"]["rope_options"] = {"shift_t": float(clone.model.diffusion_model.params.ref_index_scale)}
    first, *others = (latent.float() for latent in latents)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds({"positive": [[text, {"reference_latents": others} if others else {}]]})
    guider.sample(torch.zeros_like(first), first, comfy.samplers.KSAMPLER(once), torch.zeros(2), disable_pbar=True, seed=0)
