"""What the kernels between the products of a block promise beyond saying what their references say."""
import pytest
import torch

from pack.kernels import _rows, _triton
from pack.kernels.activate import ACTIVATE_INT8, activate_int8
from pack.kernels.gated_residual import GATED_RESIDUAL_INT8, gated_residual_int8
from pack.kernels.modulate import MODULATE, MODULATE_INT8, modulate, modulate_int8
from pack.kernels.qkv_rope import QKV_ROPE, qkv_rope
from pack.kernels.quantize import QUANTIZE_ROWS
from pack.kernels.sandwich_residual import SANDWICH_RESIDUAL_INT8, sandwich_residual_int8
from testbed import interpreter

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")      # on its way to the zero that it should be
needs_triton = pytest.mark.skipif(not _triton.HAS_TRITON, reason="there is no Triton on this system")
if _triton.HAS_TRITON:
    interpreter.round_as_a_gpu_does()
HALVES = (torch.float16, torch.bfloat16)


def given(kernel, name: str, dtype=torch.bfloat16) -> dict:
    torch.manual_seed(5)
    case = next(case for case in kernel.cases if case.name == name)
    return kernel.inputs(case.shape, **case.sizes, dtype=dtype, device="cpu")


@needs_triton
@pytest.mark.parametrize("name", ["FLUX, few tokens", "beyond a power of two"])
def test_what_stays_in_bf16_is_rounded_once(name):
    arguments = given(MODULATE, name)
    norm = torch.nn.functional.rms_norm if arguments["rms"] else torch.nn.functional.layer_norm
    x, scale, shift, weight = (None if arguments[part] is None else arguments[part].double() for part in ("x", "scale", "shift", "weight"))
    truth = norm(x, x.shape[-1:], eps=1e-6) * (1 if weight is None else weight) * (scale + arguments["one_plus"]) + shift
    for run in (MODULATE.fused, MODULATE.reference):
        assert (run(**arguments).double() - truth).norm() <= 1.7e-3 * truth.norm()


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
def test_residuals_have_the_bits_of_a_sum_written_out(dtype):
    arguments = given(GATED_RESIDUAL_INT8, "FLUX, few tokens", dtype)
    residual, _, _ = GATED_RESIDUAL_INT8.fused(**arguments)
    assert torch.equal(residual, arguments["x"] + arguments["y"] * arguments["gate"])

    arguments = given(SANDWICH_RESIDUAL_INT8, "Z-Image, few tokens", dtype)
    residual, _, _ = SANDWICH_RESIDUAL_INT8.fused(**arguments)
    y = torch.nn.functional.rms_norm(arguments["y"], arguments["y"].shape[-1:], arguments["after"], 1e-5)
    assert torch.equal(residual, arguments["x"] + arguments["gate"] * y)


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
def test_heads_are_rounded_between_norm_and_rotation_as_the_host_rounds_them(dtype):
    arguments = given(QKV_ROPE, "FLUX, few tokens", dtype)
    fused, reference = QKV_ROPE.fused(**arguments), QKV_ROPE.reference(**arguments)
    assert (fused != reference).double().mean() < 1e-3


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("kernel", "into"), [
    (QUANTIZE_ROWS, "x"), (MODULATE_INT8, "x"), (GATED_RESIDUAL_INT8, "y"), (SANDWICH_RESIDUAL_INT8, "x"), (ACTIVATE_INT8, "a")],
    ids=lambda value: getattr(value, "name", value))
def test_a_row_with_a_nan_says_so_and_no_other_does(kernel, into):
    arguments = given(kernel, next(case.name for case in kernel.cases if case.small and len(case.shape) == 3 and case.shape[1] > 1))
    arguments[into][0, 1, 7] = torch.nan
    for run in (kernel.fused, kernel.reference):
        scales = run(**arguments)[-1]
        assert scales[0, 1].isnan().all() and scales.isnan().sum() == 1


@needs_triton
def test_a_row_of_zeros_has_codes_of_zero_and_a_scale_that_can_be_divided_by():
    arguments = given(ACTIVATE_INT8, "gelu beside attention, one group")
    arguments["a"][1, 2] = 0
    arguments["attention"][1, 2] = 0
    codes, scales = ACTIVATE_INT8.fused(**arguments)
    assert not codes[1, 2].any() and codes[0, 0].any() and scales[1, 2] == torch.tensor(1e-30)


@needs_triton
def test_rows_are_cut_so_that_all_channels_are_held_and_registers_are_enough():
    for channels in (*range(1, 700), *range(700, 1 + _rows.LONGEST, 253), 3072, 3840, 6144, 10240, 12288, 15360, 24576, _rows.LONGEST):
        for itemsize in (2, 4):
            cut = _rows.pieces(channels, itemsize)
            count, width, warps = cut["PIECES"], cut["PIECE"], cut["num_warps"]
            assert count <= 4 and (count - 1) * width < channels <= count * width and width & (width - 1) == 0
            assert width % _rows.GROUP == 0 and 1 <= warps <= 32 and width == 256 * warps
    assert (_rows.pieces(3072, 2)["PIECES"], _rows.pieces(3072, 2)["PIECE"]) == (3, 1024)
    assert (_rows.pieces(10240, 2)["PIECES"], _rows.pieces(10240, 2)["PIECE"]) == (3, 4096)


def test_q_k_and_v_are_apart_and_where_attention_reads_them():
    arguments = given(QKV_ROPE, "fewer heads of k and v", torch.float32)
    q, k, v = qkv_rope(arguments["products"], arguments["q_weights"], arguments["k_weights"], arguments["table"].unsqueeze(1), heads=4, kv_heads=2)
    assert q.shape == (2, 4, 3, 24) and k.shape == v.shape == (2, 2, 3, 24)
    packed = arguments["products"][0].view(2, 3, 8, 24).transpose(1, 2)
    assert torch.equal(v, packed[:, 6:])
    alone = qkv_rope(
        arguments["products"], arguments["q_weights"], arguments["k_weights"], arguments["table"].unsqueeze(1), heads=4, kv_heads=2, with_v=False)
    assert len(alone) == 2 and torch.equal(alone[0], q) and torch.equal(alone[1], k)
    assert torch.allclose(q.norm(dim=-1), (torch.nn.functional.rms_norm(packed[:, :4], (24,), arguments["q_weights"][0])).norm(dim=-1), rtol=1e-5)


def test_both_places_of_the_heads_in_a_table_of_positions_are_taken():
    arguments = given(QKV_ROPE, "text and image", torch.float32)
    parts = arguments["products"], arguments["q_weights"], arguments["k_weights"]
    before, behind = (qkv_rope(*parts, arguments["table"].unsqueeze(axis), heads=3) for axis in (1, 2))
    assert all(torch.equal(one, other) for one, other in zip(before, behind, strict=True))


X, ROW = torch.zeros(2, 3, 256), torch.zeros(2, 1, 256)
TABLE = torch.zeros(1, 1, 3, 16, 2, 2)
WRONG = {
    "a row for every token": lambda: modulate(X, X, ROW),
    "rows of three pictures": lambda: modulate(X, ROW, torch.zeros(3, 1, 256)),
    "no pictures": lambda: modulate(X[0], ROW, ROW),
    "a weight of other channels": lambda: modulate(X, ROW, ROW, torch.ones(255)),
    "channels that are no groups": lambda: modulate_int8(X[..., :100], ROW[..., :100], rotation=True),
    "a residual of another shape": lambda: gated_residual_int8(X, X[:, :2], ROW, ROW, ROW, rotation=True),
    "a residual of another type": lambda: gated_residual_int8(X, X.bfloat16(), ROW, ROW, ROW, rotation=True),
    "a gate of other channels": lambda: sandwich_residual_int8(X, X, ROW[..., :8], torch.ones(256), torch.ones(256), ROW, rotation=True),
    "attention of other tokens": lambda: activate_int8(X, attention=X[:, :2], rotation=True),
    "two halves that differ": lambda: activate_int8(X, X[..., :8], rotation=True),
    "together no groups": lambda: activate_int8(X, attention=X[..., :8], rotation=True),
    "a product of other heads": lambda: qkv_rope([X], [torch.ones(32)], [torch.ones(32)], TABLE, heads=5),
    "positions of other tokens": lambda: qkv_rope([X[:, :2, :96]], [torch.ones(32)], [torch.ones(32)], TABLE, heads=1),
    "positions without pairs": lambda: qkv_rope([X[..., :96]], [torch.ones(32)], [torch.ones(32)], TABLE[0], heads=1),
    "one norm for two products": lambda: qkv_rope([X[..., :96], X[..., :96]], [torch.ones(32)], [torch.ones(32)], TABLE, heads=1),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit_are_one_sentence(wrong):
    with pytest.raises(ValueError, match="pass|reshape|groups of 256") as error:
        wrong()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
