"""GGUF weights: every block format against the gguf package, and the codes against the weights that they stand for."""
import pytest
import torch

from pack.kernels import gguf_weights
from pack.kernels._hadamard import rotated
from pack.kernels.gguf import BLOCKS, block_format
from pack.kernels.gguf.base import Block
from pack.kernels.gguf_weights import FUSED, gguf_codes, gguf_row_scales, gguf_values, packed_weights

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
each = pytest.mark.parametrize("block", BLOCKS.values(), ids=lambda block: block.name)


def true(packed: torch.Tensor, block: Block) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[block.name]))


@each
def test_a_format_has_the_sizes_of_the_package(block):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block.name]] == (block.weights, block.bytes)
    assert BLOCKS[block.name] is block and all(0 <= start <= block.bytes - 2 for start in block.halves)


@each
def test_random_blocks_are_decoded_to_the_bit_as_the_package_does(block, monkeypatch):
    torch.manual_seed(1)
    packed = packed_weights((7, 3 * 256), block.name, "cpu")
    assert torch.equal(block.values(packed), true(packed, block))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(gguf_values(packed, block.name, dtype), true(packed, block).to(dtype))
    monkeypatch.setattr("pack.kernels.gguf.base.AT_ONCE", 2 * 3 * 256)       # two rows at once, then one
    assert torch.equal(block.values(packed), true(packed, block))
    scales = gguf_row_scales(packed, block.name, False)
    assert torch.equal(scales, true(packed, block).abs().amax(1, keepdim=True) / 127)
    assert torch.equal(gguf_codes(packed, scales, block.name, False), (true(packed, block) / scales).round().to(torch.int8))


@each
def test_all_bit_patterns_of_a_block_are_decoded_negative_and_tiny_scales_too(block):
    torch.manual_seed(2)
    packed = torch.randint(0, 256, (64, block.bytes), dtype=torch.uint8)
    for start in block.halves:
        packed[:, start + 1] &= 0xBF        # no infinity and no NaN
    assert torch.equal(block.values(packed), true(packed, block))


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_weights_that_the_package_packs_come_back_near(name):
    torch.manual_seed(3)
    weights = torch.randn(5, 512)
    packed = torch.from_numpy(gguf.quantize(weights.numpy(), gguf.GGMLQuantizationType[name]))
    bits = BLOCKS[name].bytes * 8 / BLOCKS[name].weights
    off = (gguf_values(packed, name, torch.float32) - weights).norm() / weights.norm()
    assert off < 2.0 ** -(bits - 1.5)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rotation", [False, True], ids=["plain", "rotated"])
def test_codes_times_scales_are_the_weights_to_within_what_int8_loses(name, rotation):
    torch.manual_seed(4)
    packed = packed_weights((16, 4 * 256), name, "cpu")
    scales = gguf_row_scales(packed, name, rotation)
    codes = gguf_codes(packed, scales, name, rotation)
    weights = gguf_values(packed, name, torch.float32)
    weights = rotated(weights) if rotation else weights
    got = codes.float() * scales
    assert (got - weights).abs().max() <= 0.5001 * scales.max() and codes.abs().amax(1).eq(127).all()


def q4_k(weights: torch.Tensor) -> torch.Tensor:
    """Packs weights, [N, K], by the least and the largest of every 32. The package has no encoder of this format."""
    part = weights.reshape(-1, 8, 32)
    low, high = part.amin(2).clamp_max(0.0), part.amax(2)
    d, least = ((high - low).amax(1, keepdim=True) / (15 * 63)).half(), (-low.amin(1, keepdim=True) / 63).half()
    s, m = ((high - low) / 15 / d.float()).round().clamp(0, 63).byte(), (-low / least.float()).round().clamp(0, 63).byte()
    q = ((part + (least.float() * m).unsqueeze(2)) / (d.float() * s).unsqueeze(2)).round().clamp(0, 15).byte()
    twelve = torch.cat((s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4), 1)
    return torch.cat((d.view(torch.uint8), least.view(torch.uint8), twelve, (q[:, ::2] | q[:, 1::2] << 4).flatten(1)), 1).view(len(weights), -1)


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"])
@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy-tailed"])
def test_int8_adds_little_to_what_a_format_lost(name, heavy):
    torch.manual_seed(7)
    weights = torch.randn(64, 2048)
    if heavy:
        weights *= (1 + 4 * torch.rand(64, 1)) / torch.rand(64, 2048).clamp_min(0.2)
    packed = q4_k(weights) if name == "Q4_K" else torch.from_numpy(gguf.quantize(weights.numpy(), gguf.GGMLQuantizationType[name]))
    scales = gguf_row_scales(packed, name, True)
    kept = gguf_values(packed, name, torch.float32)
    assert (kept - weights).norm() / weights.norm() < 0.15
    got = gguf_codes(packed, scales, name, True).float() * scales
    assert (rotated(got) - kept).norm() / kept.norm() <= 0.0095


@pytest.mark.parametrize("name", FUSED)
def test_what_lies_beyond_a_row_does_not_count_for_its_scale(name):
    """The kernel reads the last 16 weights again there: were they rotated by themselves, they would be the largest."""
    pytest.importorskip("triton")
    torch.manual_seed(5)
    packed = packed_weights((3, 1280), name, "cpu")
    block = BLOCKS[name]
    last = packed.view(3, -1, block.bytes)[:, -256 // block.weights:]
    for start in block.halves:
        last[..., start:start + 2] = (last[..., start:start + 2].contiguous().view(torch.float16) * 50).view(torch.uint8)
    for rotation in (False, True):
        torch.testing.assert_close(
            gguf_weights.fused_scales(packed, name, rotation), gguf_weights.reference_scales(packed, name, rotation), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FUSED)
def test_weights_that_triton_decodes_are_the_same_bits(name):
    pytest.importorskip("triton")
    torch.manual_seed(6)
    packed = packed_weights((2, 1280), name, "cpu")
    assert torch.equal(gguf_weights.fused_values(packed, name, torch.float32), true(packed, BLOCKS[name]))


@pytest.mark.parametrize("rotation", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", FUSED)
def test_a_row_with_a_nan_says_so_in_its_scale_and_no_other_does(name, rotation):
    pytest.importorskip("triton")
    torch.manual_seed(8)
    packed = packed_weights((3, 2560), name, "cpu")
    start = BLOCKS[name].halves[0]
    packed[1, start:start + 2] = torch.tensor([torch.nan], dtype=torch.float16).view(torch.uint8)
    for run in (gguf_weights.fused_scales, gguf_weights.reference_scales):
        assert run(packed, name, rotation).isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("name", FUSED)
def test_blocks_that_begin_on_an_odd_byte_are_left_to_torch(name):
    """Their fp16 numbers are read two bytes at a time."""
    packed = packed_weights((3, 256), name, "cpu")
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), packed.flatten()))[1:].view(packed.shape)
    assert BLOCKS[name].bytes % 2 == 0 and all(start % 2 == 0 for start in BLOCKS[name].halves)
    assert gguf_weights.fits(packed, name) and not gguf_weights.fits(odd, name) and gguf_weights.fits(packed[1:], name)
    assert torch.equal(gguf_values(odd, name, torch.float32), gguf_values(packed, name, torch.float32))


def test_what_makes_no_sense_is_one_sentence():
    packed = packed_weights((2, 512), "Q4_K", "cpu")
    scales = gguf_row_scales(packed, "Q4_K", True)
    with pytest.raises(ValueError, match="'Q4_X' is no block format"):
        block_format("Q4_X")
    with pytest.raises(ValueError, match="multiple of 210 bytes"):
        gguf_values(packed, "Q6_K", torch.float32)
    with pytest.raises(ValueError, match="rows of uint8"):
        gguf_values(packed.float(), "Q4_K", torch.float32)
    with pytest.raises(ValueError, match="groups of 256"):
        gguf_codes(packed_weights((2, 96), "Q8_0", "cpu"), torch.ones(2, 1), "Q8_0", True)
    with pytest.raises(ValueError, match="from gguf_row_scales"):
        gguf_codes(packed, scales.view(-1), "Q4_K", True)


def test_a_format_without_a_kernel_goes_through_torch_on_a_gpu_too():
    packed = packed_weights((2, 512), "Q3_K", "cpu")
    assert not gguf_weights.fits(packed, "Q3_K", rotation=True) and gguf_weights.fits(packed_weights((2, 512), "Q4_K", "cpu"), "Q4_K", rotation=True)
