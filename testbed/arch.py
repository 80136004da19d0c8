"""FLUX.1 and Z-Image (NextDiT) for training: the host's parameter names, no writes in place, no host needed.

A checkpoint trained here is opened by the stock loaders; a test compares the two forwards. FLUX follows the
description in Black Forest Labs' flux repository (Apache-2.0), NextDiT the Lumina-Image 2.0 and Z-Image papers.
Tokens are [B, N, C]; both models take latents [B, 16, H, W] in model space and return the velocity eps - x0.
"""
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nodes.text import WIDTH

HEAD = 128  # channels per head, fixed by the host's detection


@dataclass(frozen=True)
class FluxConfig:
    hidden: int = 256
    depth: int = 2
    depth_single: int = 4
    axes: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000.0


@dataclass(frozen=True)
class ZImageConfig:
    """Field names are the host's: the checkpoint carries them, so that the stock loader builds the same model."""

    image_model: str = "lumina2"
    patch_size: int = 2
    in_channels: int = 16
    dim: int = 256
    cap_feat_dim: int = WIDTH
    n_layers: int = 3
    n_refiner_layers: int = 1
    qk_norm: bool = True
    n_heads: int = 2
    n_kv_heads: int = 2
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)
    rope_theta: float = 256.0
    ffn_dim_multiplier: float = 8.0 / 3.0
    multiple_of: int = 256
    z_image_modulation: bool = True
    time_scale: float = 1000.0
    pad_tokens_multiple: int = 8

    def __post_init__(self):
        if self.dim < 256:
            raise ValueError(f"a dim of {self.dim} is below 256, the width of Z-Image's time embedding, which the host cannot load; make it 256 at least")

    def as_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# The host knows Z-Image by its width of 3840 alone, but builds whatever model a checkpoint's metadata describes when
# these two tensors of LTX-Video are in the file.
Z_IMAGE_DECOY = {"adaln_single.emb.timestep_embedder.linear_1.bias": (1,), "transformer_blocks.0.attn2.to_k.weight": (32, 1)}


def time_embedding(t: Tensor, width: int = 256) -> Tensor:
    """t [B], already scaled to 0..1000, to [B, width]: cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope(positions: Tensor, axes: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """positions [N, axes] to cos and sin [N, sum(axes) / 2]."""
    angles = []
    for axis, width in enumerate(axes):
        omega = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(positions[:, axis, None].double() * omega)
    angles = torch.cat(angles, -1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, code: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, N, D], channel pairs turned by their angle."""
    cos, sin = code
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2).type_as(x)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, code) -> Tensor:
    return F.scaled_dot_product_attention(rotate(q, code), rotate(k, code), v).transpose(1, 2).flatten(2)


def grid(h: int, w: int, first: float, device) -> Tensor:
    """[h * w, 3]: (first, row, column)."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack([torch.full_like(y, first), y, x], -1).flatten(0, 1).float()


class Embedder(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    def __init__(self, hidden: int, parts: int):
        super().__init__()
        self.parts, self.lin = parts, nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, -1)


class QKNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)


class FluxAttention(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(hidden, 3 * hidden), QKNorm(), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.norm.query_norm(q), self.norm.key_norm(k), v


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class FluxStream(nn.Module):
    """Names one half of a double-stream block; `add_to` hangs its parts on the block under the host's names."""

    @staticmethod
    def add_to(block: nn.Module, name: str, hidden: int) -> None:
        block.add_module(f"{name}_mod", Modulation(hidden, 6))
        block.add_module(f"{name}_attn", FluxAttention(hidden))
        block.add_module(f"{name}_mlp", nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden)))


class DoubleBlock(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        FluxStream.add_to(self, "img", hidden)
        FluxStream.add_to(self, "txt", hidden)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, code) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn(norm(img) * (1 + img_mod[1]) + img_mod[0])
        txt_qkv = self.txt_attn(norm(txt) * (1 + txt_mod[1]) + txt_mod[0])
        out = attend(*(torch.cat(pair, 2) for pair in zip(txt_qkv, img_qkv, strict=True)), code)
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1]:]
        img = img + img_mod[2] * self.img_attn.proj(img_out)
        img = img + img_mod[5] * self.img_mlp(norm(img) * (1 + img_mod[4]) + img_mod[3])
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod[5] * self.txt_mlp(norm(txt) * (1 + txt_mod[4]) + txt_mod[3])
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.hidden, self.norm, self.modulation = hidden, QKNorm(), Modulation(hidden, 3)
        self.linear1, self.linear2 = nn.Linear(hidden, 7 * hidden), nn.Linear(5 * hidden, hidden)

    def forward(self, x: Tensor, vec: Tensor, code) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(norm(x) * (1 + scale) + shift).split([3 * self.hidden, 4 * self.hidden], -1)
        q, k, v = (heads(part) for part in qkv.chunk(3, -1))
        out = attend(self.norm.query_norm(q), self.norm.key_norm(k), v, code)
        return x + gate * self.linear2(torch.cat([out, F.gelu(mlp, approximate="tanh")], -1))


class FluxFinal(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(hidden, 64)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(norm(x) * (1 + scale) + shift)


class Flux(nn.Module):
    def __init__(self, config: FluxConfig = FluxConfig()):  # noqa: B008 - frozen
        super().__init__()
        self.config, c = config, config.hidden
        self.img_in, self.txt_in = nn.Linear(64, c), nn.Linear(WIDTH, c)
        self.time_in, self.guidance_in, self.vector_in = Embedder(256, c), Embedder(256, c), Embedder(WIDTH, c)
        self.double_blocks = nn.ModuleList(DoubleBlock(c) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(config.depth_single))
        self.final_layer = FluxFinal(c)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        b, _, h, w = x.shape
        img = self.img_in(x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        txt = self.txt_in(context)
        vec = self.time_in(time_embedding(1000 * sigma)) + self.guidance_in(time_embedding(torch.full_like(sigma, 3500.0))) + self.vector_in(pooled)
        ids = torch.cat([torch.zeros(txt.shape[1], 3, device=x.device), grid(h // 2, w // 2, 0, x.device)])
        code = rope(ids, self.config.axes, self.config.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, code)
        joint = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            joint = block(joint, vec, code)
        out = self.final_layer(joint[:, txt.shape[1]:], vec)
        return out.view(b, h // 2, w // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, 16, h, w)


class ZAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD, eps=1e-5), nn.RMSNorm(HEAD, eps=1e-5)

    def forward(self, x: Tensor, code) -> Tensor:
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return self.out(attend(self.q_norm(q), self.k_norm(k), v, code))


class ZFeedForward(nn.Module):
    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False), nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ZBlock(nn.Module):
    def __init__(self, config: ZImageConfig, modulated: bool):
        super().__init__()
        dim = config.dim
        width = config.multiple_of * math.ceil(int(config.ffn_dim_multiplier * dim) / config.multiple_of)
        self.attention, self.feed_forward = ZAttention(dim), ZFeedForward(dim, width)
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.adaLN_modulation = nn.Sequential(nn.Linear(256, 4 * dim)) if modulated else None

    def forward(self, x: Tensor, code, t: Tensor | None = None) -> Tensor:
        scale_a = gate_a = scale_f = gate_f = None
        if self.adaLN_modulation is not None:
            scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(t)[:, None].chunk(4, -1)
        for before, inner, after, scale, gate in (
            (self.attention_norm1, lambda y: self.attention(y, code), self.attention_norm2, scale_a, gate_a),
            (self.ffn_norm1, self.feed_forward, self.ffn_norm2, scale_f, gate_f),
        ):
            y = before(x) if scale is None else before(x) * (1 + scale)
            y = after(inner(y))
            x = x + (y if gate is None else gate.tanh() * y)
        return x


class ZFinal(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 64)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(256, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(norm(x) * (1 + self.adaLN_modulation(t)[:, None]))


class ZTime(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, 256))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_embedding(t))


class ZImage(nn.Module):
    def __init__(self, config: ZImageConfig = ZImageConfig()):  # noqa: B008 - frozen
        super().__init__()
        self.config, dim = config, config.dim
        self.x_embedder = nn.Linear(64, dim)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(config.cap_feat_dim, eps=1e-5), nn.Linear(config.cap_feat_dim, dim))
        self.t_embedder = ZTime(dim)
        self.noise_refiner = nn.ModuleList(ZBlock(config, True) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(ZBlock(config, False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(ZBlock(config, True) for _ in range(config.n_layers))
        self.final_layer = ZFinal(dim)
        self.x_pad_token, self.cap_pad_token = nn.Parameter(torch.zeros(1, dim)), nn.Parameter(torch.zeros(1, dim))

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor | None = None) -> Tensor:
        b, _, h, w = x.shape
        t = self.t_embedder((1 - sigma) * self.config.time_scale)
        cap = self.padded(self.cap_embedder(context), self.cap_pad_token)
        cap_ids = torch.zeros(cap.shape[1], 3, device=x.device)
        cap_ids[:, 0] = torch.arange(cap.shape[1], device=x.device) + 1
        img = self.x_embedder(x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        img_ids, real = grid(h // 2, w // 2, cap.shape[1] + 1, x.device), img.shape[1]
        img = self.padded(img, self.x_pad_token)
        img_ids = F.pad(img_ids, (0, 0, 0, img.shape[1] - real))
        codes = [rope(ids, self.config.axes_dims, self.config.rope_theta) for ids in (cap_ids, img_ids)]
        for block in self.context_refiner:
            cap = block(cap, codes[0])
        for block in self.noise_refiner:
            img = block(img, codes[1], t)
        joint = torch.cat([cap, img], 1)
        code = tuple(torch.cat(pair) for pair in zip(*codes, strict=True))
        for block in self.layers:
            joint = block(joint, code, t)
        out = self.final_layer(joint, t)[:, cap.shape[1]: cap.shape[1] + real]
        return -out.view(b, h // 2, w // 2, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(b, 16, h, w)

    def padded(self, tokens: Tensor, pad: Tensor) -> Tensor:
        missing = -tokens.shape[1] % self.config.pad_tokens_multiple
        return torch.cat([tokens, pad.expand(tokens.shape[0], missing, -1)], 1) if missing else tokens


def init_(net: nn.Module) -> nn.Module:
    """Xavier matrices; modulation and output start at zero, so that every block begins as the identity.

    Z-Image's gate passes a tanh after a norm, so its modulation starts small and its bias open instead.
    """
    zimage = isinstance(net, ZImage)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "pad_token" in name:
                nn.init.normal_(p, std=0.02)
            elif p.ndim >= 2 and zimage and "adaLN_modulation" in name:
                nn.init.normal_(p, std=0.02)
            elif p.ndim >= 2 and any(part in name for part in ("mod.lin", "modulation.lin", "adaLN", "final_layer.linear")):
                p.zero_()
            elif p.ndim >= 2:
                nn.init.xavier_uniform_(p)
            elif "norm" in name or name == "cap_embedder.0.weight":
                p.fill_(1)
            else:
                p.fill_(0.2 if zimage and "adaLN_modulation.0.bias" in name else 0)
        if zimage:
            net.final_layer.linear.weight.zero_()
    return net
