"""What a kernel is timed against: the operations of the host in their order, and comfy_kitchen's where it has one that does as much.

Each is a function of the kernel's inputs. What it gives is held against the kernel's reference by the tests.
"""
import comfy_kitchen as ck
import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout
from torch import Tensor
from torch.nn import functional as F

GROUP = 256     # of the rotation
GELU = "gelu_tanh"


def coded(x: Tensor, rotation: bool) -> tuple[Tensor, Tensor]:
    """Rows as comfy_kitchen makes codes of them: by the fast one of its backends."""
    turned = {"convrot": True, "convrot_groupsize": GROUP} if rotation else {}
    codes, params = TensorWiseINT8Layout.quantize(x.reshape(-1, x.shape[-1]), is_weight=True, per_channel=True, **turned)
    return codes.view(x.shape), params.scale.view(*x.shape[:-1], 1)


def normed(x: Tensor, weight: Tensor | None, rms: bool, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps) if rms else F.layer_norm(x, x.shape[-1:], weight, None, eps)


def modulated(x: Tensor, scale: Tensor, shift: Tensor | None, one_plus: bool) -> Tensor:
    by = 1 + scale if one_plus else scale
    return x * by if shift is None else torch.addcmul(shift, x, by)


# as the host does it ---------------------------------------------------------------------------------------------------
def quantize(x, rotation):
    return coded(x, rotation)


def modulate(x, scale, shift, weight, rms, eps, one_plus):
    return modulated(normed(x, weight, rms, eps), scale, shift, one_plus)


def modulate_int8(x, scale, shift, weight, rotation, rms, eps, one_plus):
    return coded(modulate(x, scale, shift, weight, rms, eps, one_plus), rotation)


def gated_residual(x, y, gate, scale, shift, rotation, eps, one_plus):
    residual = x + y * gate
    return residual, *coded(modulated(normed(residual, None, False, eps), scale, shift, one_plus), rotation)


def sandwich_residual(x, y, gate, after, before, scale, rotation, eps, one_plus):
    residual = x + gate * normed(y, after, True, eps)
    return residual, *coded(modulated(normed(residual, before, True, eps), scale, None, one_plus), rotation)


def activate(a, b, attention, rotation):
    y = F.gelu(a, approximate="tanh") if b is None else F.silu(a) * b
    return coded(y if attention is None else torch.cat((attention, y), -1), rotation)


def int8_linear(x, x_scales, weight, weight_scales, bias, gate, residual, gelu, out_dtype):
    """comfy_kitchen's product of codes, and what follows it by torch."""
    y = ck.mm_int8(x, weight.T).float() * x_scales.unsqueeze(1) * weight_scales
    y = y if bias is None else y + bias
    y = (F.gelu(y, approximate="tanh") if gelu else y).to(out_dtype)
    if gate is not None:
        y = (y.view(len(gate), -1, y.shape[1]) * gate.unsqueeze(1)).view(y.shape)
    return y if residual is None else residual + y


def parts(product: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a product, [B, H, N, D] each, as views."""
    return product.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)


def qkv_rope(products, q_weights, k_weights, table, heads, kv_heads, eps, with_v):
    """q, k and v, where v is wanted; streams joined."""
    streams = [parts(product, heads, kv_heads) for product in products]
    q, k = ([normed(stream[place], weight, True, eps) for stream, weight in zip(streams, weights, strict=True)]
            for place, weights in ((0, q_weights), (1, k_weights)))
    joined = lambda tensors: torch.cat(tensors, 2) if len(tensors) > 1 else tensors[0]
    q, k = ck.apply_rope(joined(q), joined(k), table.unsqueeze(1))
    return (q, k, joined([stream[2] for stream in streams])) if with_v else (q, k)


HOST = {        # name of a kernel -> operations of the host; where it has none, the kernel's reference is what it is timed against
    "quantize rows": quantize,
    "modulate": modulate,
    "modulate to int8": modulate_int8,
    "gated residual to int8": gated_residual,
    "sandwich residual to int8": sandwich_residual,
    "activate to int8": activate,
    "qkv norm and rope": qkv_rope,
    "int8 linear": int8_linear,
}


# one operation of comfy_kitchen ----------------------------------------------------------------------------------------
def kitchen_rows(x, rotation):
    return (lambda: coded(x, True)) if rotation else lambda: ck.quantize_int8_rowwise(x)


def kitchen_modulate(x, scale, shift, weight, rms, eps, one_plus):
    if not one_plus or weight is not None or shift is None:
        return None
    return lambda: (ck.rms_adaln if rms else ck.adaln)(x, scale, shift, eps)


def kitchen_rope(products, q_weights, k_weights, table, heads, kv_heads, eps, with_v):
    if len(products) > 1:
        return None
    q, k, v = parts(products[0], heads, kv_heads)
    turned = lambda: ck.rms_rope(q, k, table.unsqueeze(1), q_weights[0], k_weights[0], eps)
    return (lambda: (*turned(), v)) if with_v else turned


PEERS = {       # name of a kernel -> (its inputs) -> a call that does the same, or None where these inputs are not for it
    "quantize rows": kitchen_rows,
    "modulate": kitchen_modulate,
    "qkv norm and rope": kitchen_rope,
}
