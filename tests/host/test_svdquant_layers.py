"""SVDQuant layers of nunchaku files: unpacked to the number, computed as their method says, and told where a device is no good at it.

The files come from nunchaku_files.py, which packs by index and knows nothing of the reader.
"""
import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import comfy_kitchen
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_kitchen.backends import eager
from comfy_kitchen.constraints import FunctionConstraints
from comfy_kitchen.registry import BackendRegistry
from comfy_kitchen.tensor import svdquant_w4a4
from torch.nn import functional as F

from pack.core.quant.files import BadFile, WeightFile
from pack.core.quant.look import look
from pack.core.quant.machine import EAGER, SVDQUANT, Capabilities, Machine
from pack.core.quant.svdquant import awq, served, tiles
from pack.core.quant.svdquant.header import header
from pack.core.quant.svdquant.stored import SHIFT, take
from pack.core.quant.svdquant.weight import Segment, Weight
from testbed import nunchaku_files as nunchaku

KINDS = ("int4", "nvfp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((128, 128), (256, 128), (384, 640))
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}      # relative, of what 16 bits hold


@pytest.fixture(autouse=True)
def as_the_host_runs():
    with torch.inference_mode():
        yield


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(seed: int, *shape, upto=16):
    return torch.randint(0, upto, shape, generator=torch.Generator().manual_seed(seed))


def file(metadata=None) -> WeightFile:
    return WeightFile(Path("svdq.safetensors"), "safetensors", metadata or {}, {})


def stored(packed: nunchaku.Packed, gelu=False, name="layer"):
    left = {f"{name}.{part}": tensor for part, tensor in packed.parts.items()}
    made = take(file(), header(file()), left, name, gelu)
    assert not left, "parts that nobody took"
    return made


def layer(n=256, k=384, kind="int4", gelu=False, seed=0, rank=32, smooth=True) -> nunchaku.Packed:
    weight, most = drawn(n, k, seed=seed) / k ** 0.5, drawn(k, seed=seed + 1).abs() + 0.1
    weight[:, ::37] *= 8
    return nunchaku.svdquant(weight, drawn(n, seed=seed + 2), most if smooth else None, rank, kind, gelu)


def one(packed: nunchaku.Packed, gelu=False) -> Weight:
    made = stored(packed, gelu)
    return Weight((Segment(made, 0, made.shape[0]),), 0, made.offset())


def off(got, wanted) -> float:
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


# unpacking -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_number_is_found_where_the_packer_put_it(n, k):
    codes = whole(1, n, k)
    assert torch.equal(tiles.codes(tiles.weights(nunchaku.pack_weight(codes))).long(), codes)
    scale = drawn(n, k // 64).bfloat16()
    assert torch.equal(tiles.scales(nunchaku.pack_scale(scale)).t(), scale)
    assert torch.equal(tiles.scales(nunchaku.pack_scale(scale[:, 0])), scale[:, 0])
    micro = drawn(n, k // 16).to(torch.float8_e4m3fn)
    assert torch.equal(tiles.micro_scales(nunchaku.pack_micro(micro)).view(torch.uint8), micro.view(torch.uint8))
    for rank in (16, 48):
        down, up = drawn(rank, k), drawn(n, rank)
        assert torch.equal(tiles.down(nunchaku.pack_branch(down, down=True)), down.t())
        assert torch.equal(tiles.up(nunchaku.pack_branch(up, down=False)), up)
    assert torch.equal(tiles.codes(tiles.awq_rows(nunchaku.pack_awq(codes), torch.arange(n))).long(), codes)
    assert torch.equal(tiles.int4(tiles.weights(nunchaku.pack_weight(codes))).long() & 15, codes)
    assert torch.equal(tiles.e2m1(tiles.weights(nunchaku.pack_weight(codes))), nunchaku.E2M1[codes])


def test_some_tiles_of_a_weight_are_those_of_the_whole():
    packed = nunchaku.pack_weight(whole(2, 512, 128))
    assert torch.equal(tiles.weights(packed, 1, 3), tiles.weights(packed)[128:384])
    words, some = nunchaku.pack_awq(whole(3, 64, 128)), torch.tensor([5, 63, 0, 17])
    assert torch.equal(tiles.awq_rows(words, some), tiles.awq_rows(words, torch.arange(64))[some])


def test_a_weight_that_lies_at_an_odd_place_in_the_file_is_read():
    packed = nunchaku.pack_weight(whole(4, 128, 128))
    odd = torch.cat([torch.zeros(3, dtype=torch.int8), packed.flatten()])[3:].view(packed.shape)
    assert torch.equal(tiles.weights(odd), tiles.weights(packed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gelu", (False, True))
def test_rows_are_the_weight_that_was_packed_with_its_branch_and_without_its_smoothing(kind, gelu):
    packed = layer(kind=kind, gelu=gelu)
    made = stored(packed, gelu)
    torch.testing.assert_close(made.rows(0, 256), packed.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([made.rows(0, 100), made.rows(100, 101), made.rows(101, 256)]), made.rows(0, 256), rtol=0, atol=1e-6)
    added = made.offset()
    assert (added is not None) == (gelu and kind == "int4")
    torch.testing.assert_close(made.bias.float() + (0 if added is None else added), packed.bias, rtol=0, atol=1e-4)


def test_a_scale_for_the_whole_nvfp4_layer_is_multiplied_in():
    packed = layer(kind="nvfp4")
    half = dict(packed.parts, wtscale=torch.tensor([0.5], dtype=torch.bfloat16))
    branch = packed.weight - stored(packed).residual(0, 256)
    torch.testing.assert_close(stored(packed._replace(parts=half)).rows(0, 256), (packed.weight - branch) * 0.5 + branch, rtol=0, atol=1e-5)
    del half["wcscales"]
    rows = stored(packed).row_scale.float()[:, None]
    torch.testing.assert_close(stored(packed._replace(parts=half)).residual(0, 256) * rows, stored(packed).residual(0, 256) * 0.5, rtol=1e-5, atol=1e-8)


def test_a_layer_without_a_branch_is_read_as_one_whose_branch_is_zero():
    packed = layer()
    bare = {part: tensor for part, tensor in packed.parts.items() if not part.startswith("lora_")}
    made = one(packed._replace(parts=bare))
    torch.testing.assert_close(made.rows(0, 256), stored(packed).residual(0, 256), rtol=0, atol=1e-6)
    torch.testing.assert_close(made.packed(torch.float32).dequantize(), made.rows(0, 256), rtol=0, atol=1e-6)


@pytest.mark.parametrize("splits", (3, 6))
def test_modulation_comes_in_the_hosts_order_and_without_the_1_of_its_scales(splits):
    n = splits * 128
    packed = nunchaku.awq(drawn(n, 128) / 11, drawn(n, seed=1), splits)
    left = {f"mod.{part}": tensor for part, tensor in packed.parts.items()}
    made = awq.take(file(), header(file()), left, "mod", splits)
    assert not left
    torch.testing.assert_close(made.rows(0, n), packed.weight, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([made.rows(0, 130), made.rows(130, n)]), made.rows(0, n))
    torch.testing.assert_close(made.bias.float(), packed.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_modulation_computes_through_comfy_kitchen(dtype):
    packed = nunchaku.awq(drawn(768, 256) / 16, drawn(768, seed=1), 6)
    made = awq.take(file(), header(file()), {f"mod.{part}": tensor for part, tensor in packed.parts.items()}, "mod", 6).packed(dtype)
    x = drawn(3, 256).to(dtype)
    assert made.shape == (768, 256) and made.dtype is dtype and F.linear(x, made).dtype is dtype
    assert off(F.linear(x, made, packed.bias.to(dtype)), F.linear(x.float(), packed.weight, packed.bias)) < CLOSE[dtype]
    assert off(made.dequantize(), packed.weight) < CLOSE[dtype]


# computing -----------------------------------------------------------------------------------------------------------------------
def by_hand(x, packed: nunchaku.Packed, gelu: bool):
    """int4 as the method says: smoothed, shifted where that is so, 64 inputs to a scale, the branch on what came."""
    made = stored(packed, gelu)
    smoothed = (x + (SHIFT if gelu else 0)) / made.smooth.float()
    groups = smoothed.view(len(x), -1, 64)
    steps = 15 if gelu else 7
    scale = groups.abs().amax(-1, keepdim=True) / steps
    codes = (groups / scale).round().clamp(0 if gelu else -steps, steps)
    branch = tiles.up(made.up).float() @ tiles.down(made.down).float().t()
    return (codes * scale).view(x.shape) @ ((packed.weight - branch) * made.smooth.float()).t() + x @ branch.t() + made.bias.float()


@pytest.mark.parametrize("gelu", (False, True))
def test_int4_products_quantize_the_smoothed_input_and_add_the_branch(gelu):
    packed = layer(gelu=gelu)
    x = drawn(5, 384, seed=9)
    x = F.gelu(x) if gelu else x
    got = F.linear(x, one(packed, gelu).packed(torch.float32), packed.bias)
    assert off(got, by_hand(x, packed, gelu)) < 1e-5
    assert 1e-3 < off(got, F.linear(x, packed.weight, packed.bias)) < 0.2       # its activations have 4 bits, and that is all


def test_nvfp4_products_without_an_nvfp4_gpu_are_those_of_the_unpacked_weight():
    packed, x = layer(kind="nvfp4"), drawn(2, 3, 384, seed=9)
    got = F.linear(x, one(packed).packed(torch.float32), packed.bias)
    assert off(got, F.linear(x, packed.weight, packed.bias)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_keep_the_type_and_shape_of_their_input(kind, dtype):
    packed, x = layer(kind=kind), drawn(2, 3, 384, seed=9)
    made = one(packed).packed(dtype)
    assert made.shape == (256, 384) and made.dtype is dtype
    got = F.linear(x.to(dtype), made, packed.bias.to(dtype))
    assert got.dtype is dtype and got.shape == (2, 3, 256)
    assert off(got, F.linear(x, one(packed).packed(torch.float32), packed.bias)) < (0.04 if kind == "int4" and dtype is not torch.float32 else CLOSE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("alike", (True, False))
def test_two_layers_of_the_file_make_one_of_the_host(kind, axis, alike):
    """Above each other, as linear1 of FLUX's single blocks, smoothed alike or not; or beside each other, as linear2."""
    gelu = axis == 1
    first, second = layer(256, 128, kind, seed=3), layer(128 if axis == 0 else 256, 128 if axis == 0 else 384, kind, gelu, seed=7)
    if alike and axis == 0:
        second = nunchaku.svdquant(drawn(128, 128, seed=7) / 11, drawn(128, seed=8), drawn(128, seed=4).abs() + 0.1, 16, kind)
        smooth = {part: first.parts[part] for part in ("smooth", "smooth_orig")}
        same = stored(second).smooth.float() / stored(first).smooth.float()      # the residual is that of the other smoothing
        second = second._replace(parts={**second.parts, **smooth}, weight=(second.weight - branch(second)) * same + branch(second))
    parts = [stored(first), stored(second, gelu)]
    added = parts[1].offset()
    made = Weight(tuple(Segment(part, 0, part.shape[0]) for part in parts), axis, added)
    dense = torch.cat([first.weight, second.weight], axis)
    torch.testing.assert_close(made.rows(0, len(dense)), dense, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([made.rows(0, 200), made.rows(200, len(dense))]), made.rows(0, len(dense)), rtol=0, atol=1e-6)
    packed = made.packed(torch.float32)
    assert len(packed._params.pieces) == (1 if alike and axis == 0 else 2)
    torch.testing.assert_close(packed.dequantize(), dense, rtol=0, atol=1e-4)
    x = drawn(4, dense.shape[1], seed=11)
    x[:, 128:] = F.gelu(x[:, 128:])
    bias = torch.cat([first.bias, second.bias]) if axis == 0 else first.bias + second.bias
    alone = [F.linear(part, one(packed_, unsigned).packed(torch.float32), packed_.bias)
             for part, packed_, unsigned in zip((x, x) if axis == 0 else (x[:, :128], x[:, 128:]), (first, second), (False, gelu), strict=True)]
    assert off(F.linear(x, packed, bias), torch.cat(alone, 1) if axis == 0 else alone[0] + alone[1]) < 1e-5


def branch(packed):
    made = stored(packed)
    return tiles.up(made.up).float() @ tiles.down(made.down).float().t()


def test_an_nvfp4_layer_with_scales_for_its_rows_joins_one_without():
    first, second = layer(128, 128, "nvfp4", seed=3), layer(128, 128, "nvfp4", seed=5)
    bare = second._replace(parts={part: tensor for part, tensor in second.parts.items() if part != "wcscales"})
    parts = [stored(first), stored(bare)]
    made = Weight(tuple(Segment(part, 0, 128) for part in parts))
    torch.testing.assert_close(made.packed(torch.float32).dequantize(), made.rows(0, 256), rtol=1e-5, atol=1e-5)


def test_some_rows_of_a_layer_are_a_layer():
    """Z-Image has w3 above w1 in one layer of the file."""
    packed = layer(512, 128)
    made, x = stored(packed), drawn(3, 128)
    both = F.linear(x, one(packed).packed(torch.float32))
    for start in (0, 256):
        half = Weight((Segment(made, start, start + 256),))
        torch.testing.assert_close(half.rows(0, 256), made.rows(start, start + 256), rtol=0, atol=1e-6)
        torch.testing.assert_close(F.linear(x, half.packed(torch.float32)), both[:, start:start + 256])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gelu", (False, True))
def test_a_bias_is_added_and_nothing_else_even_where_the_input_is_shifted(kind, gelu):
    packed = layer(kind=kind, gelu=gelu)
    made, x = one(packed, gelu).packed(torch.float32), drawn(3, 384).abs()
    torch.testing.assert_close(F.linear(x, made, packed.bias) - F.linear(x, made), packed.bias.expand(3, -1), rtol=0, atol=1e-4)
    nothing = F.linear(torch.zeros(1, 384), made, packed.bias)
    assert off(nothing, packed.bias[None]) < 0.05       # the shift itself is quantized


def test_a_weight_is_the_same_moved_cloned_and_in_the_product_that_autograd_makes_of_a_layer():
    packed, x = layer(), drawn(4, 384)
    weight = one(packed).packed(torch.float32)
    wanted = F.linear(x, weight, packed.bias)
    for moved in (weight.clone(), weight.to("cpu", copy=True), weight.to(torch.bfloat16).to(torch.float32), weight.detach()):
        assert isinstance(moved, QuantizedTensor) and torch.equal(F.linear(x, moved, packed.bias), wanted)
    names, told = weight.__tensor_flatten__()
    again = QuantizedTensor.__tensor_unflatten__({name: getattr(weight, name) for name in names}, told, weight.shape, None)
    assert torch.equal(F.linear(x, again, packed.bias), wanted)
    with torch.inference_mode(False), torch.no_grad():
        weight, x, bias = one(layer()).packed(torch.float32), x.clone(), packed.bias.clone()
        assert torch.equal(F.linear(x, weight, bias), wanted)
        assert torch.equal(F.linear(x[None], weight)[0], F.linear(x, weight))
        assert torch.equal(x @ weight.t(), F.linear(x, weight)) and torch.equal(weight.t().dequantize(), weight.dequantize().t())


# what is no such layer -----------------------------------------------------------------------------------------------------------
def changed(packed, **parts):
    return {**packed.parts, **parts}


def broken(kind):
    packed = layer(kind=kind)
    parts = packed.parts
    for part in ("qweight", "wscales", "smooth", "lora_down", "lora_up"):
        yield f"without {part}", {key: tensor for key, tensor in parts.items() if key != part}
    for part, tensor in parts.items():
        if part == "smooth_orig":
            continue
        yield f"{part} in float64", changed(packed, **{part: tensor.double()})
        yield f"{part} cut", changed(packed, **{part: tensor[:-16]})
        yield f"{part} flat", changed(packed, **{part: tensor.reshape(1, -1) if tensor.ndim == 1 else tensor.reshape(-1)})
        if tensor.ndim == 2:
            yield f"{part} turned", changed(packed, **{part: tensor.t().contiguous()})
    yield "smooth with a zero", changed(packed, smooth=torch.where(torch.arange(384) == 5, 0, parts["smooth"]))
    yield "smooth with a nan", changed(packed, smooth=torch.where(torch.arange(384) == 5, float("nan"), parts["smooth"]))
    yield "a rank of 8", changed(packed, lora_down=parts["lora_down"][:, :8], lora_up=parts["lora_up"][:, :8])
    yield "two ranks", changed(packed, lora_down=parts["lora_down"][:, :16])
    yield "no columns", changed(packed, qweight=parts["qweight"][:, :0])
    if kind == "nvfp4":
        yield "a scale that is none", changed(packed, wtscale=torch.tensor([float("inf")]))


@pytest.mark.parametrize(("kind", "what", "parts"), [(kind, what, parts) for kind in KINDS for what, parts in broken(kind)],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_a_part_that_is_missing_or_does_not_fit_is_told_in_a_sentence(kind, what, parts):
    with pytest.raises(BadFile, match="layer 'x.y' is SVDQuant") as told:
        take(file(), header(file()), {f"x.y.{part}": tensor for part, tensor in parts.items()}, "x.y")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("config", "what"), [
    ('{"rank": 64}', "rank of 32 where the header says 64"), ('{"weight": {"dtype": "fp4_e2m1_all"}}', "those of int4 where the header says nvfp4"),
    ('{"rank": 30}', ""), ('{"rank": -1}', ""), ('{"weight": {"dtype": 4}}', ""), ("{}", ""), ('{"weight": {"dtype": "int4"}, "rank": 32}', ""),
])
def test_a_header_that_says_something_else_than_the_tensors_is_told(config, what):
    told = file({"quantization_config": config})
    parts = {f"x.y.{part}": tensor for part, tensor in layer().parts.items()}
    if what:
        with pytest.raises(BadFile, match=what):
            take(told, header(told), parts, "x.y")
    else:
        assert take(told, header(told), parts, "x.y").shape == (256, 384)


@pytest.mark.parametrize("change", [
    lambda parts: parts.pop("wzeros"), lambda parts: parts.pop("bias"), lambda parts: parts.update(wscales=parts["wscales"][:1]),
    lambda parts: parts.update(wzeros=parts["wzeros"][:, :-1]), lambda parts: parts.update(qweight=parts["qweight"].float()),
    lambda parts: parts.update(qweight=parts["qweight"][:-1]), lambda parts: parts.update(bias=parts["bias"][None]),
])
def test_modulation_that_does_not_fit_is_told_in_a_sentence(change):
    parts = dict(nunchaku.awq(drawn(768, 128), drawn(768), 6).parts)
    change(parts)
    with pytest.raises(BadFile, match="layer 'mod' is SVDQuant"):
        awq.take(file(), header(file()), {f"mod.{part}": tensor for part, tensor in parts.items()}, "mod", 6)


# what a device makes of it -------------------------------------------------------------------------------------------------------
CARDS = {      # compute capability -> int4, nvfp4
    (7, 5): ("emulated", "emulated"), (8, 0): ("native", "emulated"), (8, 6): ("native", "emulated"), (8, 9): ("native", "emulated"),
    (9, 0): ("emulated", "emulated"), (10, 0): ("emulated", "native"), (12, 0): ("emulated", "native"),
}


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_without_the_units_is_told_before_anything_loads(monkeypatch, capability, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card 1")
    monkeypatch.setattr(torch.version, "hip", None)
    able = dict.fromkeys(SVDQUANT, "cuda" if capability >= (8, 0) else EAGER)
    machine = Machine(kind="cuda", gpu="Card 1", capability=capability, nvfp4=capability >= (10, 0), serves={"scaled_mm_nvfp4": "cuda", **able})
    monkeypatch.setattr(served, "capabilities", lambda device: Capabilities.of(machine))
    told = served.served(torch.device("cuda", 0), kind)
    assert told.how == CARDS[capability][KINDS.index(kind)]
    assert (told.sentence == "") == (told.how == "native")
    assert told.how == "native" or ("Card 1" in told.sentence and "compute int8" in told.sentence)


@pytest.mark.parametrize("kind", KINDS)
def test_a_machine_without_a_gpu_is_told_that_weights_are_unpacked(kind):
    told = served.served(torch.device("cpu"), kind)
    assert told.how == "emulated" and "cpu" in told.sentence


def test_comfy_kitchen_without_its_cuda_kernels_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card 1")
    machine = Machine(kind="cuda", gpu="Card 1", capability=(8, 9), kitchen={"cuda": "it did not load"})
    monkeypatch.setattr(served, "capabilities", lambda device: Capabilities.of(machine))
    told = served.served(torch.device("cuda", 0), "int4")
    assert told.how == "emulated" and "it did not load" in told.sentence and "compute int8" in told.sentence


@pytest.fixture
def cuda(monkeypatch):
    """comfy_kitchen with CUDA kernels as its registry and its own layouts find them. They count their calls and compute as its plain torch."""
    calls, registry = Counter(), BackendRegistry()

    def counted(name):
        def call(*given, **named):
            calls[name] += 1
            return getattr(eager, name)(*given, **named)
        return call

    module = SimpleNamespace(**{name: counted(name) for name in SVDQUANT}, _EXT_AVAILABLE=True)
    for name, backend in (("cuda", module), (EAGER, eager)):
        registry.register(name, backend, {operation: FunctionConstraints() for operation in SVDQUANT})
    for owner in (comfy_kitchen, eager.svdquant, eager.awq):
        monkeypatch.setattr(owner, "registry", registry)
    monkeypatch.setattr(svdquant_w4a4, "_direct_cuda_backend", lambda *tensors: module)
    return calls, registry


@pytest.mark.parametrize("gelu", (False, True))
@pytest.mark.parametrize("off", (False, True), ids=("on", "off"))
def test_cuda_kernels_that_the_host_switched_off_compute_nothing_and_the_doctor_says_the_same(off, gelu, cuda):
    calls, registry = cuda
    if off:
        registry.disable("cuda")
    packed, x = layer(gelu=gelu), drawn(5, 384).abs()
    got = F.linear(x, one(packed, gelu).packed(torch.float32), packed.bias)
    torch.testing.assert_close(got, by_hand(x, packed, gelu), rtol=0, atol=1e-4)
    modulation = nunchaku.awq(drawn(768, 256) / 16, drawn(768, seed=1), 6)
    made = awq.take(file(), header(file()), {f"mod.{part}": tensor for part, tensor in modulation.parts.items()}, "mod", 6)
    F.linear(drawn(3, 256), made.packed(torch.float32))
    assert calls == ({} if off else dict.fromkeys(SVDQUANT, 1))
    route = Capabilities.of(look(torch.device("cpu"))).svdquant
    assert route.by == ("plain torch" if off else "comfy_kitchen cuda")
    assert (served.served(torch.device("cpu"), "int4").how == "native") is not off


def test_the_parameters_of_a_layout_carry_every_tensor_when_they_move():
    params = one(layer(gelu=True), gelu=True).packed(torch.float32)._params
    tensors = {field.name for field in dataclasses.fields(params) if isinstance(getattr(params, field.name), torch.Tensor)}
    assert tensors == set(params._tensor_fields())
