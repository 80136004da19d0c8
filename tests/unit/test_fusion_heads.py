"""Q and K of FLUX, from the packed product to attention, as the host's code takes them there."""
import comfy_kitchen  # noqa: F401 - the operator that turns
import pytest
import torch
from expressions_of_rows import rows, scope
from torch import Tensor, nn
from torch.nn import functional as F

from pack.core.quant.fusion import heads
from pack.core.quant.fusion.deferred import Deferred, pending, plain
from pack.core.quant.fusion.expressions import Expression, Packed
from pack.core.quant.fusion.sites import Site, replaced, replacements

B, H, D = 2, 3, 8
TEXT, IMAGE = 4, 5


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Norms(nn.Module):
    __module__ = "comfy.toy"        # stands for the host's

    def __init__(self, seed: int):
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        for place, norm in enumerate((self.query_norm, self.key_norm)):
            norm.weight.copy_(1 + 0.2 * rows(seed + place, torch.float32, D))

    def forward(self, q, k, v):
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class Block(nn.Module):
    """A double-stream block's way to attention, or with one stream a single-stream block's."""

    __module__ = "comfy.toy"

    def __init__(self, streams: int, between=lambda q, k: (q, k)):
        super().__init__()
        self.products = nn.ModuleList(nn.Linear(3 * H * D, 3 * H * D + 2) for _ in range(streams))
        self.norms = nn.ModuleList(Norms(10 * (place + 1)) for place in range(streams))
        self.between, self.seen = between, []
        for place, layer in enumerate(self.products):
            layer.weight.copy_(rows(20 + place, torch.float32, *layer.weight.shape) / 5)

    def forward(self, streams, pe=None):
        parts = []
        for x, product, norms in zip(streams, self.products, self.norms, strict=True):
            qkv, _ = torch.split(product(x), [3 * H * D, 2], dim=-1)
            q, k, v = qkv.view(qkv.shape[0], qkv.shape[1], 3, H, -1).permute(2, 0, 3, 1, 4)
            parts.append((*norms(q, k, v), v))
        q, k, v = parts[0] if len(parts) == 1 else (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        q, k = self.between(q, k)
        if pe is not None:
            q, k = torch.ops.comfy_kitchen.apply_rope(q, k, pe)
        self.seen = [type(x) for x in (q, k, v)]
        return F.scaled_dot_product_attention(q, k, v)


SITES = (Site("blocks", packed=("products.0", "products.1"), qk_norms=("norms.0", "norms.1")),)


def weight(norm, like: Tensor):
    return norm.weight.to(like.dtype)


def table(tokens: int, dtype=torch.float32) -> Tensor:
    angles = 6 * torch.rand((1, 1, tokens, D // 2), generator=torch.Generator().manual_seed(3))
    return torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).unflatten(-1, (2, 2)).to(dtype)


def run(block: Block, streams: list[Tensor], open_: bool = True, **more):
    """(what the host makes of it, what the block does with heads that wait, its record)"""
    true = block(streams, **more)
    network, s = nn.Module(), scope(open=open_)
    network.blocks = nn.ModuleList([block])
    with replaced(lambda: replacements(s, SITES, network, weight)):
        found = block(streams, **more)
    return true, found, s.record


def streams(count: int) -> list[Tensor]:
    return [rows(30 + place, torch.float32, B, tokens, 3 * H * D) for place, tokens in enumerate((TEXT, IMAGE)[:count])]


@pytest.mark.parametrize(("count", "name"), [(1, "norm+rope of q and k"), (2, "norm+cat+rope of q and k")])
def test_norms_joining_and_positions_are_one_kernel_and_attention_sees_plain_tensors(count, name):
    block = Block(count)
    true, found, record = run(block, streams(count), pe=table(sum((TEXT, IMAGE)[:count])))
    assert dict(record.fused) == {name: 1} and block.seen == [Tensor] * 3
    assert (found - true).abs().max() <= 2e-6


OTHERWISE = {
    "no positions": {"pe": None},
    "positions in fp16": {"pe": table(TEXT + IMAGE, torch.float16)},
    "a block that others look into": {"pe": table(TEXT + IMAGE), "open_": False},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_anything_else_is_the_host_s_to_the_bit(name):
    block = Block(2)
    true, found, record = run(block, streams(2), **OTHERWISE[name])
    assert torch.equal(true, found) and not record.fused and block.seen == [Tensor] * 3


def halved(q, k):
    return q, k * 0.5


def swapped(q, k):
    return k, q


def cut(q, k):
    return q[:, :, 1:], k[:, :, 1:]


@pytest.mark.parametrize("between", [halved, swapped, cut])
def test_whatever_is_done_with_q_and_k_before_they_are_turned_counts(between):
    block = Block(2, between)
    tokens = TEXT + IMAGE - (between is cut)
    attention = F.scaled_dot_product_attention
    if between is cut:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v[:, :, 1:]))
            true, found, record = run(block, streams(2), pe=table(tokens))
    else:
        true, found, record = run(block, streams(2), pe=table(tokens))
    assert torch.equal(true, found) and not record.fused


def test_a_kernel_that_is_wrong_is_seen(monkeypatch):
    right = heads.qkv_rope
    monkeypatch.setattr(heads, "qkv_rope", lambda *args, **options: [part * 1.5 for part in right(*args, **options)])
    true, found, _ = run(Block(2), streams(2), pe=table(TEXT + IMAGE))
    assert (found - true).abs().max() > 0.01


def test_q_of_one_stream_is_not_joined_to_k_of_another():
    s, norms = scope(), heads.Norms((), None)
    q, k = (Deferred(s, heads.Normed(rows(place, torch.float32, B, H, TEXT, D), rows(2), place, norms)) for place in (0, 1))
    assert heads.joined((q, k)) is None and pending(heads.joined((q, q)), heads.Joint)


def test_heads_of_a_product_written_to_are_computed_from_what_was_written():
    s = scope(open=True, turning=True)
    packed = Deferred(s, Packed(rows(1, torch.float32, B, IMAGE, 3 * H * D)))
    q, k, v = packed.view(B, IMAGE, 3, H, -1).permute(2, 0, 3, 1, 4)
    q[:, 0] = 2.0
    assert pending(q, Expression) is None and torch.equal(plain(q)[:, 0], torch.full_like(plain(q)[:, 0], 2.0))
    assert pending(k, heads.Head) and type(v) is Tensor
