"""The kernels of whole blocks against what the host's own classes and comfy_kitchen compute at the same place."""
import comfy.ops
import comfy.quant_ops
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, EmbedND, SingleStreamBlock, apply_mod
from comfy.ldm.flux.math import apply_rope
from comfy.ldm.lumina.model import JointTransformerBlock, apply_gate, modulate

from pack.kernels.activate import activate_int8
from pack.kernels.gated_residual import gated_residual_int8
from pack.kernels.modulate import modulate as adaptive_norm
from pack.kernels.modulate import modulate_int8
from pack.kernels.qkv_rope import qkv_rope
from pack.kernels.sandwich_residual import sandwich_residual_int8

C, HEADS, N, TYPE = 512, 4, 33, torch.bfloat16
ck = comfy.quant_ops.ck


def filled(module):
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2 if "norm" in name else 0.05)
    return module.eval()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)
    with torch.inference_mode():
        yield


@pytest.fixture
def double():
    return filled(DoubleStreamBlock(C, HEADS, 4.0, qkv_bias=True, dtype=TYPE, operations=comfy.ops.manual_cast))


@pytest.fixture
def single():
    return filled(SingleStreamBlock(C, HEADS, 4.0, dtype=TYPE, operations=comfy.ops.manual_cast))


@pytest.fixture
def joint():
    settings = {"operations": comfy.ops.manual_cast, "dtype": TYPE, "device": "cpu"}
    return filled(JointTransformerBlock(0, C, HEADS, HEADS, 256, 8 / 3, 1e-5, True, z_image_modulation=True, operation_settings=settings))


def tokens(channels: int = C, batch: int = 2) -> torch.Tensor:
    """Of sizes far apart, with a few channels far larger than the rest."""
    x = torch.randn(batch, N, channels) * torch.exp(torch.randn(batch, N, 1))
    x[..., ::97] *= 20
    return x.to(TYPE)


def off(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def norm64(x, weight=None, *, rms: bool, eps: float) -> torch.Tensor:
    x = x.double()
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps) if rms else torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return y if weight is None else y * weight.double()


def product_errors(host: torch.Tensor, codes, scales, truth: torch.Tensor) -> tuple[float, float]:
    """How far a rotated int8 product is from the exact one: with our codes, and as comfy_kitchen makes it from the host's activations."""
    weight = 0.05 * torch.randn(256, truth.shape[-1])
    quantized, weight_scales = torch.ops.comfy_kitchen.quantize_int8_convrot_weight(weight, 256)
    exact = truth @ weight.double().T
    ours = (codes.double() @ quantized.double().T) * scales * weight_scales.view(-1)
    theirs = ck.int8_linear(host, quantized, weight_scales, None, torch.float32, convrot=True, convrot_groupsize=256)
    return off(ours, exact), off(theirs, exact)


def test_the_adaptive_norm_is_nearer_to_the_truth_than_the_hosts_three_roundings(double):
    x = tokens()
    mod, _ = double.img_mod(torch.randn(2, C).to(TYPE))
    truth = norm64(x, rms=False, eps=1e-6) * (1 + mod.scale.double()) + mod.shift.double()
    host = apply_mod(double.img_norm1(x), 1 + mod.scale, mod.shift)
    ours = adaptive_norm(x, mod.scale, mod.shift)
    assert ours.dtype is TYPE and off(ours, truth) <= 1.7e-3 < off(host, truth)
    near, far = product_errors(host, *modulate_int8(x, mod.scale, mod.shift, rotation=True), truth)
    assert near < min(far, 0.015)


def test_the_residual_between_flux_products_has_the_hosts_bits(double):
    x, y = tokens(), tokens()
    mod1, mod2 = double.img_mod(torch.randn(2, C).to(TYPE))
    img = x.clone()
    img += apply_mod(y, mod1.gate)
    residual, codes, scales = gated_residual_int8(x, y, mod1.gate, mod2.scale, mod2.shift, rotation=True)
    assert torch.equal(residual, img)
    truth = norm64(img, rms=False, eps=1e-6) * (1 + mod2.scale.double()) + mod2.shift.double()
    host = apply_mod(double.img_norm2(img), 1 + mod2.scale, mod2.shift)
    near, far = product_errors(host, codes, scales, truth)
    assert near < min(far, 0.015)


def test_the_residual_between_z_image_products_has_the_hosts_bits(joint):
    x, y = tokens(), tokens()
    _, gate, scale, _ = joint.adaLN_modulation(torch.randn(2, 256).to(TYPE)).chunk(4, dim=1)
    host_residual = x + apply_gate(gate.unsqueeze(1).tanh(), joint.attention_norm2(y))
    residual, codes, scales = sandwich_residual_int8(
        x, y, gate.unsqueeze(1).tanh(), joint.attention_norm2.weight, joint.ffn_norm1.weight, scale.unsqueeze(1), rotation=True, eps=1e-5)
    assert torch.equal(residual, host_residual)
    truth = norm64(residual, joint.ffn_norm1.weight, rms=True, eps=1e-5) * (1 + scale.unsqueeze(1).double())
    near, far = product_errors(modulate(joint.ffn_norm1(residual), scale), codes, scales, truth)
    assert near < min(far, 0.015)


def test_the_first_norm_of_a_z_image_block_is_the_adaptive_norm_with_a_weight(joint):
    x = tokens()
    scale = joint.adaLN_modulation(torch.randn(2, 256).to(TYPE)).chunk(4, dim=1)[0]
    truth = norm64(x, joint.attention_norm1.weight, rms=True, eps=1e-5) * (1 + scale.unsqueeze(1).double())
    host = modulate(joint.attention_norm1(x), scale)
    arguments = {"weight": joint.attention_norm1.weight, "rms": True, "eps": 1e-5}
    assert off(adaptive_norm(x, scale.unsqueeze(1), **arguments), truth) <= 1.7e-3 < off(host, truth)
    near, far = product_errors(host, *modulate_int8(x, scale.unsqueeze(1), rotation=True, **arguments), truth)
    assert near < min(far, 0.015)


def test_the_last_product_of_a_single_stream_block_gets_what_the_host_copies_together(single):
    attention, packed = tokens(), tokens(3 * C + 4 * C)
    mlp = packed[..., 3 * C:]       # a part of linear1's output
    host = torch.cat((attention, single.mlp_act(mlp)), 2)
    truth = torch.cat((attention.double(), torch.nn.functional.gelu(mlp.double(), approximate="tanh")), 2)
    near, far = product_errors(host, *activate_int8(mlp, attention=attention, rotation=True), truth)
    assert near < min(far, 0.015)


def test_the_last_product_of_a_feed_forward_gets_what_the_host_multiplies(joint):
    a, b = tokens(3 * C), tokens(3 * C)
    host = joint.feed_forward._forward_silu_gating(a, b)
    truth = torch.nn.functional.silu(a.double()) * b.double()
    near, far = product_errors(host, *activate_int8(a, b, rotation=True), truth)
    assert near < min(far, 0.015)


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of elements with other bits; 1 where any is further off than its neighbours."""
    steps = (got.view(torch.int16).int() - wanted.contiguous().view(torch.int16).int()).abs()
    near = (steps <= 1) | ((got.float() - wanted.float()).abs() < 1e-6)
    return (got != wanted).double().mean().item() if bool(near.all()) else 1.0


@pytest.mark.parametrize("batch", [1, 2])
def test_q_k_and_v_of_a_double_stream_block_are_the_hosts(double, batch):
    text, image = torch.randn(batch, 7, 3 * C).to(TYPE), torch.randn(batch, N, 3 * C).to(TYPE)
    ids = torch.randint(0, 64, (1, 7 + N, 3)).float()
    positions = EmbedND(C // HEADS, 10000, [C // HEADS // 2, C // HEADS // 4, C // HEADS // 4])(ids)
    streams = []
    for attention, qkv in ((double.txt_attn, text), (double.img_attn, image)):
        q, k, v = qkv.view(batch, -1, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        streams.append((*attention.norm(q, k, v), v))
    host_q, host_k, host_v = (torch.cat(parts, 2) for parts in zip(*streams, strict=True))
    host_q, host_k = apply_rope(host_q, host_k, positions)
    norms = [(attention.norm.query_norm, attention.norm.key_norm) for attention in (double.txt_attn, double.img_attn)]
    q, k, v = qkv_rope([text, image], [q.weight for q, _ in norms], [k.weight for _, k in norms], positions, heads=HEADS, eps=norms[0][0].eps)
    assert torch.equal(v, host_v) and apart(q, host_q) < 1e-3 and apart(k, host_k) < 1e-3


def test_q_and_k_of_a_z_image_block_are_the_hosts(joint):
    attention, width = joint.attention, C // HEADS
    packed = torch.randn(1, N, 3 * C).to(TYPE)
    positions = EmbedND(width, 256.0, [width // 4, 3 * width // 8, 3 * width // 8])(torch.randint(0, 64, (1, N, 3)).float()).movedim(1, 2)
    q, k, v = (part.view(1, N, HEADS, width) for part in packed.split(C, -1))
    weights = attention.q_norm.weight, attention.k_norm.weight
    eps = attention.q_norm.eps if attention.q_norm.eps is not None else torch.finfo(torch.float32).eps
    host_q, host_k = ck.rms_rope(q, k, positions, *weights, eps)
    got_q, got_k, got_v = qkv_rope([packed], [weights[0]], [weights[1]], positions, heads=HEADS, eps=eps)
    assert torch.equal(got_v, v.movedim(1, 2)) and apart(got_q, host_q.movedim(1, 2)) < 1e-3 and apart(got_k, host_k.movedim(1, 2)) < 1e-3
