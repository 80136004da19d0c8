"""The models that `bench gpu` computes: the host's own classes at the published sizes, with random weights, in four formats.

Blocks of a stack share their tensors in the host's memory, and none on the GPU: so the host holds one block of each kind.
"""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.ops
import torch
from torch import Generator, Tensor, nn

from pack.core.quant import transcode
from pack.core.quant.files import Blocks, WeightFile
from pack.core.quant.layer import Layer
from pack.core.quant.loader import load_file
from pack.core.quant.plan import Settings
from pack.core.quant.sensitive import is_sensitive
from pack.kernels.gguf import BLOCKS
from testbed.arch import Z_IMAGE_DECOY, ZImageConfig
from testbed.tiny import value

BF16, FP8, INT8, Q4_K = "bf16", "scaled fp8", "int8, rotated", "GGUF Q4_K through int8"
TRANSCODED = {FP8: "fp8", INT8: "int8"}
PACKED = {Q4_K: "Q4_K"}
FORMATS = (BF16, FP8, INT8, Q4_K)
SPREAD = 258.0      # standard deviation of s q - 7.5 m of Q4_K for random bits: d is so much smaller than that of the weights


@dataclass(frozen=True)
class Subject:
    """build: the network on the meta device, with so many blocks in each of `stacks`, by name."""

    name: str
    family: str                                 # the host's image_model
    build: Callable[..., nn.Module]
    stacks: dict[str, int]                      # name of the stack -> blocks of the published model
    spoken: dict[str, str]                      # name of the stack -> what its blocks are called
    text: int                                   # width of the text embedding
    pooled: int = 0
    guidance: float | None = None
    config: dict = field(default_factory=dict)
    metadata: Callable[[dict], dict] = lambda config: {}
    decoy: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def with_blocks(self, count: int) -> "Subject":
        """The same with fewer blocks in each stack."""
        return replace(self, stacks={stack: min(count, blocks) for stack, blocks in self.stacks.items()})

    def network(self) -> nn.Module:
        return self.build(self.config, self.stacks)

    def conditioning(self, tokens: int) -> list:
        generator = Generator().manual_seed(1)
        more = {"pooled_output": torch.randn(1, self.pooled, generator=generator)} if self.pooled else {}
        return [[torch.randn(1, tokens, self.text, generator=generator), {**more, **({} if self.guidance is None else {"guidance": self.guidance})}]]


def flux_network(config: dict, stacks: dict[str, int]) -> nn.Module:
    return comfy.ldm.flux.model.Flux(
        image_model="flux", in_channels=16, out_channels=16, mlp_ratio=4.0, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=True, txt_ids_dims=[], depth=stacks["double_blocks"], depth_single_blocks=stacks["single_blocks"], **config,
        dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)


def z_image_network(config: dict, stacks: dict[str, int]) -> nn.Module:
    return comfy.ldm.lumina.model.NextDiT(
        **z_image_config(config, stacks), dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)


def z_image_config(config: dict, stacks: dict[str, int]) -> dict:
    return {**config, "n_layers": stacks["layers"]}


def flux(hidden: int = 3072, text: int = 4096, pooled: int = 768, double: int = 19, single: int = 38) -> Subject:
    return Subject(
        "FLUX.1", "flux", flux_network, {"double_blocks": double, "single_blocks": single},
        {"double_blocks": "double-stream", "single_blocks": "single-stream"}, text=text, pooled=pooled, guidance=3.5,
        config={"hidden_size": hidden, "num_heads": hidden // 128, "context_in_dim": text, "vec_in_dim": pooled})


def z_image(dim: int = 3840, text: int = 2560, layers: int = 30, refiners: int = 2) -> Subject:
    config = ZImageConfig(dim=dim, cap_feat_dim=text, n_layers=layers, n_refiner_layers=refiners, n_heads=dim // 128, n_kv_heads=dim // 128,
                          pad_tokens_multiple=32).as_dict()
    stacks = {"layers": layers}
    return Subject("Z-Image", "lumina2", z_image_network, stacks, {"layers": "single-stream"}, text=text, config=config, decoy=Z_IMAGE_DECOY)


# weights ---------------------------------------------------------------------------------------------------------------
def weights(subject: Subject, form: str, device: torch.device) -> WeightFile:
    """The model in a format, as a file of it would be opened. Made on `device`, kept in the host's memory."""
    network = subject.network()
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    known: dict[tuple, dict] = {}
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Blocks] = {}
    for key, tensor in network.state_dict().items():
        layer, end = key.removesuffix(".weight"), key.endswith(".weight")
        kind = (re.sub(r"\.\d+\.", ".#.", key), tuple(tensor.shape))
        if kind not in known:
            known[kind] = made(layer if end and layer in linears else "", key, tensor.shape, form, subject, device)
        for suffix, part in known[kind].items():
            name = layer + suffix if end else key
            (packed if isinstance(part, Blocks) else tensors)[name] = part
    tensors |= {key: torch.zeros(shape) for key, shape in subject.decoy.items()}
    metadata = {"config": json.dumps({"transformer": z_image_config(subject.config, subject.stacks)})} if subject.decoy else {}
    return WeightFile(Path(f"random {subject.name}"), "gguf" if form in PACKED else "safetensors", metadata, tensors, packed)


def made(layer: str, key: str, shape: torch.Size, form: str, subject: Subject, device: torch.device) -> dict[str, Tensor | Blocks]:
    """Suffix -> tensor, of one tensor of the state dict. layer: its linear layer, empty where it is not the weight of one."""
    inside = bool(layer) and any(layer.startswith(f"{stack}.") for stack in subject.stacks)
    if inside and form in PACKED and shape[1] % BLOCKS[PACKED[form]].weights == 0:      # makers of GGUF files pack modulations too
        return {".weight": Blocks(PACKED[form], tuple(shape), q4_k(shape, device).cpu())}
    whole = value(key, shape, Generator(device).manual_seed(0)).to(torch.bfloat16)
    if inside and form in TRANSCODED and not is_sensitive(layer, subject.family):
        source = Layer(layer, BF16, tuple(shape), unpack=lambda start, stop: whole[start:stop], nbytes=whole.nbytes)
        return transcode.TRANSCODERS[TRANSCODED[form]](source, device)
    return {".weight" if key.endswith(".weight") else "": whole.cpu()}


def q4_k(shape: torch.Size, device: torch.device) -> Tensor:
    """Blocks of random bits whose weights have a mean of 0 and the spread of random weights."""
    known = BLOCKS["Q4_K"]
    generator = Generator(device).manual_seed(0)
    blocks = torch.randint(0, 256, (shape[0], shape[1] // known.weights, known.bytes), dtype=torch.uint8, device=device, generator=generator)
    d = 1.0 / (SPREAD * shape[1] ** 0.5)
    for at, number in zip(known.halves, (d, 7.5 * d), strict=True):
        blocks[..., at:at + 2] = torch.tensor([number], dtype=torch.float16, device=device).view(torch.uint8)
    return blocks.view(shape[0], -1)


def load(subject: Subject, form: str, device: torch.device):
    """A ModelPatcher, by the pack's loader and the host's, whose weights are on the GPU as a whole while it samples."""
    file = weights(subject, form, device)
    patcher, _ = load_file(file, Settings(compute="int8" if form in PACKED else "host"), disable_dynamic=True)
    return patcher
