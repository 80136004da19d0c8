"""Row codes and the rotation against comfy_kitchen's, and the int8 linear layer against exact arithmetic."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pack.kernels import _triton, int8_linear, quantize
from pack.kernels._hadamard import GROUP, rotated
from pack.kernels.int8_tiles import TABLE, USUAL, tile
from pack.kernels.quantize import quantize_rows

needs_triton = pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")
linear = int8_linear.int8_linear


def heavy(*shape) -> torch.Tensor:
    """Weights with rows of different sizes and outliers."""
    return torch.randn(shape) * (1 + 4 * torch.rand(shape[0], 1)) / torch.rand(shape).clamp_min(0.05)


def test_the_rotation_is_comfy_kitchens():
    utils = pytest.importorskip("comfy_kitchen.tensor.int8_utils")
    torch.manual_seed(0)
    x, h = torch.randn(9, 3 * GROUP, dtype=torch.float64), utils._build_hadamard(GROUP, dtype=torch.float64)
    torch.testing.assert_close(rotated(x), (x.view(9, 3, GROUP) @ h).view(9, -1), rtol=1e-12, atol=1e-12)


def test_rotating_twice_gives_back_what_came():
    x = torch.randn(4, 5, 2 * GROUP)
    torch.testing.assert_close(rotated(rotated(x)), x)
    with pytest.raises(ValueError, match="groups of 256"):
        rotated(torch.ones(2, 300))


@pytest.mark.parametrize("make", [torch.randn, heavy], ids=["gaussian", "heavy-tailed"])
def test_codes_and_scales_are_comfy_kitchens(make):
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    torch.manual_seed(1)
    x = make(64, 3072)
    x[5] = 0.0
    codes, scales = quantize_rows(x, False)
    theirs, their_scales = eager.quantize_int8_rowwise(x)
    assert torch.equal(codes, theirs) and torch.equal(scales, their_scales)

    codes, scales = quantize_rows(x, True)
    theirs, their_scales = eager.quantize_int8_convrot_weight(x, GROUP)
    torch.testing.assert_close(scales, their_scales, rtol=2e-6, atol=0)       # they rotate by a product, which sums in another order
    apart = (codes.int() - theirs.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 5e-5


def test_rotated_int8_loses_no_more_than_it_may():
    torch.manual_seed(2)
    for x, most in ((torch.randn(256, 3072), 0.0090), (heavy(256, 3072), 0.0095)):
        codes, scales = quantize_rows(x, True)
        assert (rotated(codes.float() * scales) - x).norm() / x.norm() <= most


def test_a_linear_layer_on_activations_with_outliers_is_three_times_as_near_as_fp8():
    torch.manual_seed(3)
    x, weight = torch.randn(128, 3072), heavy(512, 3072)
    x[:, ::100] *= 20
    y = linear(*quantize_rows(x, True), *quantize_rows(weight, True), out_dtype=torch.float32)
    true = x @ weight.T
    fp8 = lambda value: (value * (448 / value.abs().max())).to(torch.float8_e4m3fn).float() * (value.abs().max() / 448)
    off = lambda y: ((y - true).norm() / true.norm()).item()
    assert off(y) <= 0.015 and off(fp8(x) @ fp8(weight).T) > 2.5 * off(y)


def exact(given: dict) -> torch.Tensor:
    """In fp64, from integers."""
    y = (given["x"].double() @ given["weight"].double().T) * given["x_scales"].double().unsqueeze(1) * given["weight_scales"].double()
    if given["bias"] is not None:
        y = y + given["bias"].double()
    if given["gelu"]:
        y = F.gelu(y, approximate="tanh")
    if given["gate"] is not None:
        y = y * given["gate"].double().repeat_interleave(len(y) // len(given["gate"]), 0)
    return y if given["residual"] is None else y + given["residual"].double()


@needs_triton
@pytest.mark.parametrize("case", [case for case in int8_linear.INT8_LINEAR.cases if case.small], ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["float32", "bfloat16"])     # the interpreter cuts bf16 off
@pytest.mark.parametrize("arch", [89, 90])      # told of its tiles by descriptors of the kernel, or of the host
def test_the_int8_linear_layer_is_exact_but_for_rounding_its_result(case, dtype, most, arch, monkeypatch):
    monkeypatch.setattr(int8_linear, "architecture", lambda device: arch)
    torch.manual_seed(4)
    given = int8_linear.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu")
    true = exact(given)
    for run in (int8_linear.fused, int8_linear.reference):
        y = run(**given)
        assert y.dtype is dtype and (y.double() - true).norm() <= most * true.norm()


def test_the_wrapper_takes_tokens_of_several_pictures():
    torch.manual_seed(5)
    x, weight = torch.randn(2, 21, 512), torch.randn(40, 512)
    bias, gate, residual = torch.randn(40), torch.randn(2, 1, 40), torch.randn(2, 21, 40)
    y = linear(*quantize_rows(x, True), *quantize_rows(weight, True), bias, out_dtype=torch.float32, gelu=True, gate=gate, residual=residual)
    true = residual + gate * F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert y.shape == true.shape and (y - true).norm() / (true - residual).norm() < 0.015
    one = linear(*quantize_rows(x, True), *quantize_rows(weight, True), bias, out_dtype=torch.float32, gate=gate[0, 0], residual=residual)
    torch.testing.assert_close(one, residual + gate[:1] * linear(*quantize_rows(x, True), *quantize_rows(weight, True), bias, out_dtype=torch.float32))


def test_what_does_not_go_together_is_one_sentence():
    x, scales = quantize_rows(torch.randn(6, 512), True)
    weight, columns = quantize_rows(torch.randn(40, 512), True)
    for wrong, said in (
        ({"x": x.float()}, "int8"), ({"weight": weight[:, :256]}, "were expected"), ({"x_scales": scales[:3]}, "one for each"),
        ({"weight_scales": columns[:1]}, "one for each"), ({"gate": torch.ones(40)}, "residual with it"),
        ({"gate": torch.ones(4, 1, 40), "residual": torch.ones(6, 40)}, "a gate"),
    ):
        with pytest.raises(ValueError, match=said):
            linear(**({"x": x, "x_scales": scales, "weight": weight, "weight_scales": columns, "out_dtype": torch.float32} | wrong))


def test_every_size_has_a_tile_and_large_products_have_the_usual_one():
    for arch in (0, 80, 86, 89, 90, 100, 120, 121):
        for rows in (1, 16, 17, 128, 129, 512, 513, 4352, 1 << 20):
            for columns in (16, 3072, 21504):
                assert tile(arch, rows, columns) in [row.tile for row in TABLE]
        assert tile(arch, 4352, 3072) is tile(arch, 4352, 21504) is USUAL and tile(arch, 1, 3072).m == 16
        assert tile(arch, 4352, 3072, crowded=True).n == 64
    assert TABLE[-1].fits(0, 1 << 30, 1 << 30, False)


def test_rows_that_registers_cannot_hold_are_left_to_torch():
    for channels, dtype, fits in ((24576, torch.bfloat16, True), (24576, torch.float32, True), (40960, torch.float32, False), (40960, torch.float16, False)):
        assert quantize.fits(torch.empty(2, channels, dtype=dtype), True) is fits
    assert not quantize.fits(torch.empty(2, 512).T, False) and not quantize.fits(torch.empty(0, 512), True)


def test_rows_that_do_not_begin_on_16_bytes_are_left_to_torch():
    given = int8_linear.inputs((8, 32), K=64, dtype=torch.float32, device="cpu")
    assert int8_linear.fits(**given)
    assert not int8_linear.fits(**int8_linear.inputs((8, 32), K=63, dtype=torch.float32, device="cpu"))
    assert not int8_linear.fits(**given | {"x": torch.zeros(8 * 64 + 1, dtype=torch.int8)[1:].view(8, 64)})
    assert not int8_linear.fits(**given | {"weight": given["weight"].repeat(1, 2)[:, ::2]})


def on(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, as the choice of a product sees it on such a device."""
    class Elsewhere(torch.Tensor):
        device = torch.device(kind)

    return tensor.as_subclass(Elsewhere)


def test_the_product_is_exact_on_devices_without_an_int8_one():
    torch.manual_seed(6)
    x, weight = (torch.randint(-127, 128, (rows, 5000), dtype=torch.int8) for rows in (3, 5))
    true = x.long() @ weight.long().T
    assert torch.equal(int8_linear.product(x, weight).long(), true)
    assert torch.equal(int8_linear.product(on("mps", x), weight).as_subclass(torch.Tensor).long(), true)


class Made(TorchDispatchMode):
    """The names of the operators that run, and how much of the largest result there is, of whatever has more than 16 bits to a number."""

    def __init__(self):
        super().__init__()
        self.names, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if isinstance(result, torch.Tensor) and result.dtype.itemsize > 2:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("sizes", [{"gelu": True}, {"gates": 3}, {"residual": True, "bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_torch_takes_beside_the_result_does_not_grow_with_its_rows(sizes, dtype, monkeypatch):
    torch.manual_seed(7)
    given = int8_linear.inputs((3 * 170, 40), K=72, **sizes, dtype=dtype, device="cpu")
    whole = int8_linear.reference(**given)
    monkeypatch.setattr(int8_linear, "AT_ONCE", 100 * 40)
    with Made() as made:
        y = int8_linear.reference(**given)
    # torch's GELU rounds otherwise in what is left of a vector
    assert torch.allclose(y, whole, rtol=1e-6, atol=1e-7) if sizes.get("gelu") and dtype is torch.float32 else torch.equal(y, whole)
    assert dtype is torch.float32 or made.most <= 100 * 40      # the result itself has 32 bits in fp32
    assert made.names.count("aten._int_mm.default") == 6


@pytest.mark.parametrize(("M", "N", "K", "pads"), [(64, 40, 72, 0), (17, 8, 16, 0), (3, 40, 72, 1), (64, 41, 72, 1), (64, 41, 70, 2), (0, 8, 16, 0)])
def test_on_cuda_torch_gets_sides_that_it_takes_and_copies_codes_only_where_it_must(M, N, K, pads, monkeypatch):
    torch.manual_seed(8)
    given = int8_linear.inputs((M, N), K=K, dtype=torch.float32, device="cpu")
    wanted, multiply = int8_linear.reference(**given), torch._int_mm

    def strict(x, weight):
        assert x.shape[0] > 16 and x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0
        return multiply(x, weight)

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr(int8_linear, "fake", lambda *_: torch.full((M, N), torch.nan))
    with Made() as made:
        y = int8_linear.reference(**given | {"x": on("cuda", given["x"])})
    assert torch.equal(y.as_subclass(torch.Tensor), wanted)
    assert sum("constant_pad" in name for name in made.names) == pads
