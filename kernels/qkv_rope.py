"""From a packed qkv product to what attention takes: RMS norm of each head of q and k, rotary positions, heads in front of tokens.

    q = rope(rmsnorm(q) w_q)        k = rope(rmsnorm(k) w_k)        v
    rope(x)_2i   = f_i00 x_2i + f_i01 x_2i+1
    rope(x)_2i+1 = f_i10 x_2i + f_i11 x_2i+1

Several products, text and image of a double-stream block say, go to where they belong in one result, which the host copies together
from three times two. The norm is rounded before the rotation, as the host rounds it. comfy_kitchen's `rms_rope` does the norm and the
rotation of one product, where its CUDA backend works; call that there.
"""
import torch
from torch import Tensor

from ._op import operator
from ._rows import batch_stride
from ._triton import FLOATS, tl, triton
from .spec import Case, Kernel, Limits, nbytes

AT_ONCE = 8     # heads of a token that one program takes
MOST = 256                  # channels of a head


def qkv_rope(
    products: list[Tensor], q_weights: list[Tensor], k_weights: list[Tensor], positions: Tensor, *,
    heads: int, kv_heads: int | None = None, eps: float | None = None, with_v: bool = True,
) -> tuple[Tensor, ...]:
    """products: of each stream in the order of its tokens, [B, N_s, (heads + 2 kv_heads) D], q, k and v one after the other, all of one type.

    q_weights, k_weights: [D], of each stream. positions: the host's table, fp32 [B or 1, 1, N, D/2, 2, 2] or [B or 1, N, 1, D/2, 2, 2],
    N all tokens. eps: None is what torch's RMS norm takes for None, FLUX's case.
    Returns q [B, heads, N, D] and k, v [B, kv_heads, N, D], views of one tensor; without v, which attention may read where it is, q and k.

    The pack fuses FLUX's heads, as many of k as of q, and leaves v where it is. kv_heads is for models with fewer of k, with_v for an
    attention that wants all three side by side.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    packed = heads + 2 * kv_heads
    shapes = [tuple(product.shape) for product in products]
    tokens = sum(shape[1] for shape in shapes)
    if any(len(shape) != 3 or shape[0] != shapes[0][0] or shape[2] != shapes[0][2] or shape[2] % packed for shape in shapes):
        raise ValueError(f"products of the shapes {shapes} came; pass [B, N, {packed} D] each, for {heads} heads and {kv_heads} of k and v")
    width = shapes[0][2] // packed
    if any(weight.shape != (width,) for weight in (*q_weights, *k_weights)) or not len(products) == len(q_weights) == len(k_weights):
        raise ValueError(f"{len(products)} products of heads {width} wide came with other norms; pass a weight [{width}] of q and one of k for each")
    table = table_of(positions)
    if table.shape[0] not in (1, shapes[0][0]) or table.shape[1:] != (tokens, width // 2, 2, 2) or width % 2:
        raise ValueError(f"positions {tuple(positions.shape)} came for {tokens} tokens and heads {width} wide; pass [1, 1, {tokens}, {width // 2}, 2, 2]")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    joined = OP(list(products), list(q_weights), list(k_weights), table, heads, kv_heads, eps, with_v)
    return joined.split((heads, kv_heads, kv_heads) if with_v else (heads, kv_heads), 1)


def table_of(positions: Tensor) -> Tensor:
    """[B or 1, N, D/2, 2, 2], from one with an axis of heads before the tokens or behind them."""
    if positions.ndim != 6 or 1 not in positions.shape[1:3]:
        raise ValueError(f"positions of the shape {tuple(positions.shape)} came; pass [B, 1, N, D/2, 2, 2] or [B, N, 1, D/2, 2, 2]")
    return positions.squeeze(1 if positions.shape[1] == 1 else 2)


# plain torch: the definition of right ----------------------------------------------------------------------------------
def reference(
    products: list[Tensor], q_weights: list[Tensor], k_weights: list[Tensor], table: Tensor, heads: int, kv_heads: int, eps: float, with_v: bool,
) -> Tensor:
    """[B, heads + kv_heads, N, D], of q and k; with v kv_heads more."""
    parts = []
    for product, q_weight, k_weight in zip(products, q_weights, k_weights, strict=True):
        batch, tokens, _ = product.shape
        rows = product.reshape(batch, tokens, heads + 2 * kv_heads, -1).transpose(1, 2)
        q, k, v = rows.split((heads, kv_heads, kv_heads), 1)
        parts.append(torch.cat((normed(q, q_weight, eps), normed(k, k_weight, eps), *([v] if with_v else [])), 1))
    joined = torch.cat(parts, 2)
    turned = joined[:, :heads + kv_heads]
    pairs = turned.float().unflatten(-1, (-1, 1, 2))        # [B, heads + kv_heads, N, D/2, 1, 2]
    f = table.unsqueeze(1)
    joined[:, :heads + kv_heads] = (f[..., 0] * pairs[..., 0] + f[..., 1] * pairs[..., 1]).flatten(-2).to(joined.dtype)
    return joined


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


# Triton ----------------------------------------------------------------------------------------------------------------
@triton.jit
def _qkv_rope_kernel(
    product, q_weight, k_weight, table, joined,
    heads, kv_heads, q_parts, kv_parts, packed, channels, first, tokens,        # this stream's tokens begin at `first` of `tokens`
    product_batch, product_token, table_batch, table_token, eps,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):
    token, part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    TYPE: tl.constexpr = product.dtype.element_ty

    # Which heads: those of q, of k or of v, and never of two at once.
    begin, end, weight = 0, heads, q_weight
    if part >= q_parts:
        part -= q_parts
        begin, end, weight = heads, heads + kv_heads, k_weight
    turned = part < kv_parts or begin == 0
    if not turned:
        part -= kv_parts
        begin, end = heads + kv_heads, packed

    head = begin + part.to(tl.int64) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK).to(tl.int64)
    inside = (head < end)[:, None] & (at < channels)[None, :]

    # [HEADS, BLOCK]
    b_out = tl.load(product + (batch * product_batch + token * product_token) + (head[:, None] * channels + at[None, :]), mask=inside, other=0.0)
    if turned:
        b_x = b_out.to(tl.float32)
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) / channels + eps)[:, None]
        b_x *= tl.load(weight + at, mask=at < channels, other=0.0).to(tl.float32)[None, :]
        b_x = b_x.to(TYPE).to(tl.float32)
        # The two of each pair of channels, at the places of both; and the table's two numbers for each place.
        b_first, b_second = tl.split(tl.reshape(b_x, (HEADS, BLOCK // 2, 2)))
        b_first, b_second = tl.join(b_first, b_first), tl.join(b_second, b_second)
        entry = tl.arange(0, 2 * BLOCK).to(tl.int64)
        b_table = tl.load(table + (batch * table_batch + (first + token) * table_token) + entry, mask=entry < channels + channels, other=0.0)
        b_of_first, b_of_second = tl.split(tl.reshape(b_table, (BLOCK, 2)))
        b_x = b_of_first[None, :] * tl.reshape(b_first, (HEADS, BLOCK)) + b_of_second[None, :] * tl.reshape(b_second, (HEADS, BLOCK))
        b_out = b_x.to(TYPE)

    row = (batch * packed + head) * tokens + first + token
    tl.store(joined + (row[:, None] * channels + at[None, :]), b_out, mask=inside)


def fused(products, q_weights, k_weights, table, heads: int, kv_heads: int, eps: float, with_v: bool) -> Tensor:
    joined = fake(products, q_weights, k_weights, table, heads, kv_heads, eps, with_v)
    batch, packed, tokens, channels = joined.shape
    q_parts, kv_parts = (triton.cdiv(count, AT_ONCE) for count in (heads, kv_heads))
    block, first = triton.next_power_of_2(channels), 0
    with torch.cuda.device_of(joined):
        for product, q_weight, k_weight in zip(products, q_weights, k_weights, strict=True):
            _qkv_rope_kernel[(product.shape[1], q_parts + (2 if with_v else 1) * kv_parts, batch)](
                product, q_weight, k_weight, table, joined, heads, kv_heads, q_parts, kv_parts, packed, channels, first, tokens,
                product.stride(0), product.stride(1), batch_stride(table), table.stride(1), eps,
                HEADS=AT_ONCE, BLOCK=block, num_warps=max(AT_ONCE * block // 512, 1))
            first += product.shape[1]
    return joined


def fits(products, q_weights, k_weights, table, heads, kv_heads, **_) -> bool:
    first = products[0]
    weights = (*q_weights, *k_weights)
    return (
        first.dtype in FLOATS and table.dtype is torch.float32 and first.shape[-1] // (heads + 2 * kv_heads) <= MOST
        and all(product.dtype is first.dtype and product.stride(-1) == 1 and product.numel() > 0 for product in products)
        and all(weight.dtype is weights[0].dtype and weight.dtype in FLOATS and weight.is_contiguous() for weight in weights)
        and table[0, 0].is_contiguous()
        and all(tensor.device == first.device for tensor in (*products, *weights, table)))


def fake(products, q_weights, k_weights, table, heads, kv_heads, eps, with_v) -> Tensor:
    first, tokens = products[0], sum(product.shape[1] for product in products)
    shape = (first.shape[0], heads + (2 if with_v else 1) * kv_heads, tokens, first.shape[-1] // (heads + 2 * kv_heads))
    return torch.empty(shape, dtype=first.dtype, device=first.device)


OP = operator("qkv_rope", reference, fused, fake, fits)


# for the tests and the benchmark ---------------------------------------------------------------------------------------
def inputs(shape, heads: int, kv_heads: int | None = None, text: int = 0, beside: int = 0, with_v: bool = True, *, dtype, device) -> dict:
    """shape: [B, N, D], N all tokens, `text` of them of a stream of their own. beside: channels of the product that are not qkv."""
    batch, tokens, channels = shape
    kv_heads = kv_heads or heads
    make = lambda *sizes: torch.randn(sizes, device=device)
    widths = [text, tokens - text] if text else [tokens]
    wide = (heads + 2 * kv_heads) * channels
    products = [(3 * make(batch, width, wide + beside)).to(dtype)[..., :wide] for width in widths]
    weights = [[(1 + 0.2 * make(channels)).to(dtype) for _ in widths] for _ in range(2)]
    angles = 6.3 * torch.rand((1, tokens, channels // 2), device=device)
    table = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).unflatten(-1, (2, 2))
    return {
        "products": products, "q_weights": weights[0], "k_weights": weights[1], "table": table.contiguous(),
        "heads": heads, "kv_heads": kv_heads, "eps": 1e-6, "with_v": with_v}


def traffic(products, q_weights, k_weights, table, heads, kv_heads, eps, with_v) -> int:
    moved = 2 * nbytes(*products)
    unmoved = 0 if with_v else moved * kv_heads // (heads + 2 * kv_heads)
    return moved - unmoved + nbytes(*q_weights, *k_weights, table)


QKV_ROPE = Kernel(
    name="qkv norm and rope", reference=reference, fused=fused, inputs=inputs, traffic=traffic, op=OP, limits=Limits(registers=64),
    cases=(
        Case("one pair of channels", (2, 3, 2), heads=1),
        Case("channels of no power of two", (1, 5, 12), heads=3, with_v=False),
        Case("fewer heads of k and v", (2, 3, 24), heads=4, kv_heads=2),
        Case("text and image", (2, 7, 16), heads=3, text=3),
        Case("more heads than a program takes, a wider product", (1, 3, 128), heads=5, beside=48),
        Case("FLUX, few tokens", (1, 3, 128), heads=24, text=1),
        Case("many tokens", (1, 9, 128), heads=3),
        Case("FLUX double-stream block 1024px", (1, 4352, 128), heads=24, text=256),
        Case("FLUX single-stream block 1024px", (1, 4352, 128), heads=24, beside=12288, with_v=False),
        Case("Z-Image 1024px", (1, 4192, 128), heads=30),
    ),
)
