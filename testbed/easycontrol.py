"""A tiny EasyControl adapter for the test bed's FLUX: an edge map, and the caption, to the picture with those edges.

The base stays as it is. The condition is a third stream that runs through the image stream's weights at t = 0, with LoRA
on q, k and v, and in double-stream blocks on the output of the projection; it sees itself alone, and text and image see
it. Written from the description in Zhang et al., arXiv 2503.07027, without the host; a test compares it with the nodes.
"""
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import procedural
from .arch import Flux, attend, grid, heads, norm, rope, rotate, time_embedding
from .data import GROUND, Emoji
from .edges import edges
from .nodes.patch_vae import PatchVAE
from .nodes.text import encode

RANK = 64
SLOT = 0
DRAWN = 0.4     # share of drawn shapes; the others are emoji
UNNAMED = 0.3   # share of captions that are dropped, so that the edges alone have to do


class Lora(nn.Module):
    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.down.weight, std=width ** -0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class EasyControl(nn.Module):
    """The adapter's weights, and the base they act on, which is no part of the state dict."""

    def __init__(self, base: Flux, rank: int = RANK):
        super().__init__()
        self.bases, width = [base.requires_grad_(False)], base.config.hidden     # in a list, so that it is no submodule
        self.doubles = nn.ModuleList(nn.ModuleDict({part: Lora(width, rank) for part in ("q", "k", "v", "proj")}) for _ in base.double_blocks)
        self.singles = nn.ModuleList(nn.ModuleDict({part: Lora(width, rank) for part in "qkv"}) for _ in base.single_blocks)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, condition: Tensor) -> Tensor:
        """x, condition: [B, 16, H, W] in model space, of one size."""
        [base] = self.bases
        b, _, h, w = x.shape
        text = base.txt_in(context)
        place = grid(h // 2, w // 2, 0, x.device)
        code = rope(torch.cat([torch.zeros(text.shape[1], 3, device=x.device), place]), base.config.axes, base.config.theta)
        conditions = self.keys_and_values(condition, pooled, rope(place, base.config.axes, base.config.theta))
        image, vec, words = base.img_in(patches(x)), vector(base, sigma, pooled), text.shape[1]
        for block, kept in zip(base.double_blocks, conditions, strict=False):
            image_mod, text_mod = block.img_mod(vec), block.txt_mod(vec)
            image_qkv = block.img_attn(norm(image) * (1 + image_mod[1]) + image_mod[0])
            text_qkv = block.txt_attn(norm(text) * (1 + text_mod[1]) + text_mod[0])
            out = attend_with(*(torch.cat(pair, 2) for pair in zip(text_qkv, image_qkv, strict=True)), code, kept)
            image = image + image_mod[2] * block.img_attn.proj(out[:, words:])
            image = image + image_mod[5] * block.img_mlp(norm(image) * (1 + image_mod[4]) + image_mod[3])
            text = text + text_mod[2] * block.txt_attn.proj(out[:, :words])
            text = text + text_mod[5] * block.txt_mlp(norm(text) * (1 + text_mod[4]) + text_mod[3])
        joint = torch.cat([text, image], 1)
        for block, kept in zip(base.single_blocks, conditions[len(base.double_blocks):], strict=True):
            shift, scale, gate = block.modulation(vec)
            qkv, mlp = block.linear1(norm(joint) * (1 + scale) + shift).split([3 * block.hidden, 4 * block.hidden], -1)
            q, k, v = (heads(part) for part in qkv.chunk(3, -1))
            out = attend_with(block.norm.query_norm(q), block.norm.key_norm(k), v, code, kept)
            joint = joint + gate * block.linear2(torch.cat([out, F.gelu(mlp, approximate="tanh")], -1))
        out = base.final_layer(joint[:, words:], vec)
        return out.view(b, h // 2, w // 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, 16, h, w)

    def keys_and_values(self, condition: Tensor, pooled: Tensor, code) -> list[tuple[Tensor, Tensor]]:
        """Of every block, K turned by its position and V, [B, H, N, D] each."""
        [base] = self.bases
        own, kept = base.img_in(patches(condition)), []
        vec = vector(base, torch.zeros(len(condition), device=condition.device), pooled)
        for block, loras in zip(base.double_blocks, self.doubles, strict=True):
            mod = block.img_mod(vec)
            x = norm(own) * (1 + mod[1]) + mod[0]
            q, k, v = (heads(part + loras[name](x)) for name, part in zip("qkv", block.img_attn.qkv(x).chunk(3, -1), strict=True))
            q, k = block.img_attn.norm.query_norm(q), block.img_attn.norm.key_norm(k)
            kept.append((rotate(k, code), v))
            out = block.img_attn.proj(attend(q, k, v, code))
            own = own + mod[2] * (out + loras["proj"](out))
            own = own + mod[5] * block.img_mlp(norm(own) * (1 + mod[4]) + mod[3])
        for block, loras in zip(base.single_blocks, self.singles, strict=True):
            shift, scale, gate = block.modulation(vec)
            x = norm(own) * (1 + scale) + shift
            qkv, mlp = block.linear1(x).split([3 * block.hidden, 4 * block.hidden], -1)
            q, k, v = (heads(part + loras[name](x)) for name, part in zip("qkv", qkv.chunk(3, -1), strict=True))
            q, k = block.norm.query_norm(q), block.norm.key_norm(k)
            kept.append((rotate(k, code), v))
            own = own + gate * block.linear2(torch.cat([attend(q, k, v, code), F.gelu(mlp, approximate="tanh")], -1))
        return kept


def published(name: str) -> str:
    """The name that a weight of EasyControl has in the authors' files: doubles.0.q.down.weight becomes ...q_loras.0.down.weight."""
    kind, block, part, half, weight = name.split(".")
    return f"{'single_' if kind == 'singles' else ''}transformer_blocks.{block}.attn.processor.{part}_loras.{SLOT}.{half}.{weight}"


def patches(x: Tensor) -> Tensor:
    """[B, 16, H, W] to tokens [B, H W / 4, 64]."""
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def vector(base: Flux, sigma: Tensor, pooled: Tensor) -> Tensor:
    return base.time_in(time_embedding(1000 * sigma)) + base.guidance_in(time_embedding(torch.full_like(sigma, 3500.0))) + base.vector_in(pooled)


def attend_with(q: Tensor, k: Tensor, v: Tensor, code, kept: tuple[Tensor, Tensor]) -> Tensor:
    k, v = torch.cat([rotate(k, code), kept[0].to(k)], 2), torch.cat([v, kept[1].to(v)], 2)
    return F.scaled_dot_product_attention(rotate(q, code), k, v).transpose(1, 2).flatten(2)


class Placed:
    """Emoji and drawn shapes where a caption does not say: moved, turned, mirrored and of another size; and their edges."""

    def __init__(self, px: int, emoji: Emoji):
        self.px, self.emoji, self.demo = px, emoji, torch.tensor(emoji.demo)
        colour, alpha = emoji.pictures[:, :3].float() / 255, emoji.pictures[:, 3:].float() / 255
        self.layers = F.interpolate(torch.cat([colour * alpha, alpha], 1), size=(2 * px, 2 * px), mode="area")

    def batch(self, n: int, g: Generator) -> tuple[Tensor, list[str]]:
        """Pictures [n, 3, px, px] and their captions."""
        chosen = torch.randint(0, len(self.layers), (n,), generator=g)
        judged = self.demo[torch.randint(0, len(self.demo), (n,), generator=g)]
        chosen = torch.where(torch.rand(n, generator=g) < 0.5, judged, chosen)
        pictures, names = self.moved(chosen, g), [self.emoji.names[i] for i in chosen.tolist()]
        drawn, drawn_names = procedural.batch(n, self.px, g)
        for i in torch.nonzero(torch.rand(n, generator=g) < DRAWN).flatten().tolist():
            pictures[i], names[i] = drawn[i], drawn_names[i]
        return pictures, names

    def moved(self, chosen: Tensor, g: Generator) -> Tensor:
        n = len(chosen)
        size = 0.45 + 0.55 * torch.rand(n, generator=g)
        angle = (torch.rand(n, generator=g) - 0.5) * 0.8
        mirror = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
        shift = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - size)[:, None]
        cos, sin = angle.cos() / size, angle.sin() / size
        linear = torch.stack([torch.stack([mirror * cos, mirror * sin], 1), torch.stack([-sin, cos], 1)], 1)
        matrix = torch.cat([linear, -(linear @ shift[:, :, None])], 2)
        places = F.affine_grid(matrix, [n, 4, 2 * self.px, 2 * self.px], align_corners=False)
        layers = F.avg_pool2d(F.grid_sample(self.layers[chosen], places, align_corners=False), 2)
        return (layers[:, :3] + GROUND * (1 - layers[:, 3:])).clamp(0, 1)


class Steered:
    """Flow matching as for the base, at higher sigmas more often: that is where a picture's lines are decided."""

    def __init__(self, net: EasyControl, emoji: Emoji, plan, device: str):
        self.net, self.plan, self.device, self.vae = net, plan, device, PatchVAE()
        self.pictures = {px: Placed(px, emoji) for px in {px for _, px in plan.phases}}

    def loss(self, step: int, g: Generator) -> Tensor:
        n = self.plan.batch
        pictures, names = self.pictures[self.plan.px(step)].batch(n, g)
        tokens, pooled = (torch.cat(part) for part in zip(*(encode(name) for name in names), strict=True))
        named = (torch.rand(n, generator=g) > UNNAMED).float()
        clean, condition = self.vae.to_model_space(pictures), self.vae.to_model_space(edges(pictures))
        sigma = torch.sigmoid(torch.randn(n, generator=g) * 1.2 + 0.8).clamp(1e-3, 1)
        sigma = torch.where(torch.rand(n, generator=g) < 0.15, 1 - 0.1 * torch.rand(n, generator=g), sigma)
        eps = torch.randn(clean.shape, generator=g)
        at = sigma.view(-1, 1, 1, 1)
        given = ((1 - at) * clean + at * eps, sigma, tokens * named[:, None, None], pooled * named[:, None], condition)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            v = self.net(*(t.to(self.device) for t in given))
        return (v.float() - (eps - clean).to(self.device)).square().mean()
