"""Combine: a weighted sum in fp32, whatever goes in; through plain torch and through Triton the same promises hold."""
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pack.kernels import combine as module
from pack.kernels import drift
from pack.kernels._triton import HAS_TRITON
from pack.kernels.combine import FLOATS, FP8, MOST, combine, combine_error, reference
from pack.kernels.drift import relative_error, sampled

DTYPES = list(FLOATS)
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton on this system"))
WAYS = pytest.mark.parametrize("way", ["torch", TRITON])
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton on this system")


@contextmanager
def through(way: str, samples: int = drift.SAMPLE):
    """Combine goes this way, checked at its end: the CPU passes for a GPU on which Triton works, and its interpreter for the GPU."""
    with mock.patch.object(module, "usable", lambda device: way == "triton"), mock.patch.object(drift, "SAMPLE", samples), \
            mock.patch.object(module, "launch", side_effect=module.launch) as launched:
        yield
        assert bool(launched.call_count) == (way == "triton"), f"this was to go through {way}"


def snapshots(n: int, dtype, shape=(2, 5, 7), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


@WAYS
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(weights=st.lists(st.floats(-8, 8), min_size=1, max_size=MOST))
@settings(max_examples=25)
def test_it_is_the_weighted_sum_in_fp32_rounded_once(way, dtype, anchored, weights):
    past, anchor = snapshots(len(weights), dtype), snapshots(1, dtype, seed=1)[0] if anchored else None
    exact = sum((weight * snapshot.double() for weight, snapshot in zip(weights, past, strict=True)), anchor.double() if anchored else 0)
    with through(way):
        out = combine(weights, past, anchor)
    assert out.dtype == dtype and out.shape == past[0].shape
    scale = sum(abs(weight) for weight in weights) * 4 + 4
    wanted = exact.to(dtype)
    assert torch.allclose(out.double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=1e-6 * scale)


@WAYS
@given(data=st.data(), a=st.floats(-3, 3), b=st.floats(-3, 3), K=st.integers(1, MOST))
@settings(max_examples=25)
def test_it_is_linear_in_its_weights(way, data, a, b, K):
    one, other = (data.draw(st.lists(st.floats(-4, 4), min_size=K, max_size=K)) for _ in range(2))
    past = snapshots(K, torch.float32, seed=K)
    with through(way):
        together = combine([a * v + b * w for v, w in zip(one, other, strict=True)], past)
        apart = a * combine(one, past) + b * combine(other, past)
    assert torch.allclose(together, apart, atol=1e-6 * 4 * (1 + 24 * K))


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_terms_that_cancel_do_not_lose_the_rest(way, dtype):
    past = [torch.full((4,), 3.0, dtype=dtype)] * 3
    with through(way):
        assert torch.equal(combine([1000.0, 1.0, -1000.0], past), past[0]), "accumulated in the type of the snapshots, the middle term is lost"


@WAYS
@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_a_new_tensor_and_leaves_its_inputs_alone(way, dtype, weights):
    for anchor in (None, *snapshots(1, dtype, seed=1)):
        past = snapshots(len(weights), dtype)
        before = [tensor.clone() for tensor in (*past, *([] if anchor is None else [anchor]))]
        with through(way):
            out = combine(weights, past, anchor)
        assert out.data_ptr() not in {tensor.data_ptr() for tensor in (*past, *([] if anchor is None else [anchor]))}
        out.fill_(float("nan"))
        after = (*past, *([] if anchor is None else [anchor]))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_snapshot_at_weight_one_is_itself_bit_for_bit(way, dtype):
    (only,) = snapshots(1, dtype)
    with through(way):
        assert torch.equal(combine([1.0], [only]), only)


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_snapshot_at_weight_zero_is_not_read(way, dtype):
    broken, good = torch.full((9,), torch.nan, dtype=dtype), snapshots(1, dtype, (9,))[0]
    with through(way):
        assert torch.equal(combine([0.0, 1.0, 0.0], [broken, good, broken]), good)
        assert torch.equal(combine([0.0], [broken]), torch.zeros(9, dtype=dtype))
        assert torch.equal(combine([0.0], [broken], good), good)


@WAYS
def test_fp16_is_held_at_the_end_of_its_range_and_not_a_number_stays_that(way):
    high, low = (torch.tensor([value, -value, torch.nan], dtype=torch.float16) for value in (60000.0, 40000.0))
    with through(way):
        out = combine([2.0, -1.0], [high, low])
        assert out.dtype is torch.float16 and out[:2].tolist() == [65504, -65504] and out[2].isnan()
        assert combine([2.0], [high.float()], out_dtype=torch.float16)[:2].tolist() == [65504, -65504]
        assert combine([2.0], [high], out_dtype=torch.float32)[:2].tolist() == [120000, -120000]


@WAYS
def test_every_fp8_number_is_read_as_torch_reads_it(way):
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    with through(way):
        out = combine([1.0], [every], out_dtype=torch.float32)
    assert torch.equal(out.nan_to_num(nan=1e9), every.float().nan_to_num(nan=1e9)) and out.isnan().sum() == 2


@WAYS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_of_an_fp8_snapshot_goes_into_its_weight(way, dtype):
    true, scales, weights = snapshots(3, torch.float32), (0.01, 0.5, 2.0), (1.0, -3.0, 3.0)
    stored = [(value / scale).to(FP8) for value, scale in zip(true, scales, strict=True)]
    with through(way):
        out = combine([w * s for w, s in zip(weights, scales, strict=True)], stored, out_dtype=dtype)
    exact = sum(w * s * value.double() for w, s, value in zip(weights, scales, stored, strict=True))
    assert out.dtype is dtype and torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@WAYS
@pytest.mark.parametrize("samples", [1, 50, 100000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_drift_is_that_of_the_sample(way, dtype, samples):
    past, (anchor, against) = snapshots(3, dtype, (3, 8, 63)), snapshots(2, dtype, (3, 8, 63), seed=1)
    with through(way, samples):
        out, told = combine([1.0, -3.0, 3.0], past, anchor, against=against)
        by_hand = relative_error(sampled(out), sampled(against))
    assert torch.equal(out, reference([1.0, -3.0, 3.0], past, anchor)) or way == "triton"
    assert told.shape == () and told.dtype is torch.float32 and told.item() == pytest.approx(by_hand.item(), rel=1e-5)


@WAYS
def test_the_drift_looks_nowhere_but_at_the_sample(way):
    shape, step = (1500,), (1500 // 100) | 1
    (value,), planted = snapshots(1, torch.float32, shape), snapshots(1, torch.float32, shape)[0]
    planted[torch.arange(1500) % step != 0] = torch.nan
    with through(way, samples=100):
        out, told = combine([1.0], [value], against=planted)
        assert torch.equal(out, value) and told == 0 and combine_error([1.0], [planted], value) == 0
    planted[3 * step] += 1
    with through(way, samples=100):
        assert combine([1.0], [value], against=planted)[1] > 0 and combine_error([1.0], [planted], value) > 0


@WAYS
@pytest.mark.parametrize("samples", [50, 100000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_the_drift_of_what_combine_would_return(way, dtype, samples):
    past, (actual,) = snapshots(4, dtype, (3, 8, 63)), snapshots(1, dtype, (3, 8, 63), seed=1)
    with through(way, samples):
        error = combine_error([-1.0, 4.0, -6.0, 4.0], past, actual)
        drifted = combine([-1.0, 4.0, -6.0, 4.0], past, against=actual)[1]
    assert error.shape == () and error.dtype is torch.float32 and error.item() == pytest.approx(drifted.item(), rel=1e-5)


@WAYS
def test_the_drift_from_nothing_is_finite_and_from_not_a_number_is_none(way):
    (value,) = snapshots(1, torch.float32)
    with through(way, samples=20):
        assert combine([1.0], [value], against=torch.zeros_like(value))[1].item() == pytest.approx(sampled(value).abs().mean().item() / drift.FLOOR)
        assert combine_error([1.0], [value * torch.nan], value).isnan()


def test_weights_and_snapshots_must_be_as_many():
    for weights, n in (([1.0, 2.0], 1), ([1.0], 2), ([], 0)):
        for call in (combine, lambda w, s: combine_error(w, s, torch.ones(2))):
            with pytest.raises(ValueError, match=f"{len(weights)} weights came with {n} snapshots"):
                call(weights, snapshots(n, torch.float32))


def test_shapes_that_differ_are_an_error_and_not_broadcast():
    wide, narrow = torch.ones(2, 3), torch.ones(1, 3)
    for call in (lambda: combine([1.0, 1.0], [wide, narrow]), lambda: combine([1.0], [wide], narrow),
                 lambda: combine([1.0], [wide], against=narrow), lambda: combine_error([1.0], [wide], narrow)):
        with pytest.raises(ValueError, match=r"shapes \(1, 3\), \(2, 3\) came together"):
            call()


@pytest.mark.parametrize(("dtype", "told"), [(FP8, None), (FP8, FP8), (torch.float32, FP8), (torch.float32, torch.int32), (torch.int64, None)])
def test_a_result_that_could_not_hold_a_sum_is_an_error(dtype, told):
    with pytest.raises(ValueError, match="tell out_dtype, one of"):
        combine([1.0], [torch.ones(3).to(dtype)], out_dtype=told)


PLAIN = {   # what the kernel does not take, and plain torch does
    "not contiguous": lambda: dict(snapshots=[value.transpose(0, 1) for value in snapshots(2, torch.float32)]),
    "one not contiguous": lambda: dict(snapshots=[snapshots(1, torch.float32, (4, 4))[0], snapshots(1, torch.float32, (4, 4))[0].T]),
    "an anchor that is not": lambda: dict(snapshots=snapshots(2, torch.float32, (4, 4)), anchor=snapshots(1, torch.float32, (4, 4))[0].T),
    "empty": lambda: dict(snapshots=snapshots(2, torch.float32, (0, 3))),
    "too many": lambda: dict(snapshots=snapshots(MOST + 1, torch.float32)),
    "two types": lambda: dict(snapshots=[*snapshots(1, torch.float32), *snapshots(1, torch.float16)]),
    "fp64": lambda: dict(snapshots=snapshots(2, torch.float64)),
    "an fp64 anchor": lambda: dict(snapshots=snapshots(2, torch.float32), anchor=snapshots(1, torch.float64)[0]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_the_kernel_does_not_take_goes_through_torch(name):
    given = PLAIN[name]()
    past, anchor = given["snapshots"], given.get("anchor")
    weights = [(-1.0) ** k * (k + 1) for k in range(len(past))]
    with mock.patch.object(module, "usable", lambda device: True), mock.patch.object(module, "launch", side_effect=AssertionError):
        out = combine(weights, past, anchor)
    exact = sum((w * value.double() for w, value in zip(weights, past, strict=True)), 0 if anchor is None else anchor.double())
    assert out.dtype is past[0].dtype and torch.allclose(out.double(), exact, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_element_goes_through_the_kernel(shape):
    with through("triton"):
        out, told = combine([2.0], [torch.full(shape, 3.0)], against=torch.full(shape, 4.0))
    assert out.shape == shape and out.item() == 6 and told.shape == () and told.item() == pytest.approx(0.5)


class Operations(TorchDispatchMode):
    """The names of what torch itself does."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@needs_triton
@pytest.mark.parametrize("dtype", [*DTYPES, FP8])
def test_a_launch_copies_nothing_waits_for_nothing_and_is_given_the_tensors_themselves(dtype):
    past, (anchor, against) = snapshots(3, dtype), snapshots(2, torch.float16, seed=1)
    kernel = mock.MagicMock()
    with through("triton"), mock.patch.object(module, "_combine_kernel", kernel), Operations() as done:
        out, _ = combine([1, -2, 3.0], past, anchor, out_dtype=torch.float16, against=against)
        combine_error([1, -2, 3.0], past, against)
    assert done.names <= {"empty", "empty_like", "view", "detach", "sum", "div", "select", "clamp_min"}
    for call, made in zip(kernel.__getitem__.return_value.call_args_list, ((anchor, against, out), (None, against, None)), strict=True):
        values = call.args
        assert [value.data_ptr() for value in values[:3]] == [value.data_ptr() for value in past]
        assert values[8:11] == (1.0, -2.0, 3.0) and all(type(value) is float for value in values[8:16]), "each other type is compiled anew"
        assert all(a is b for a, b in zip(values[16:19], made, strict=True)) and call.kwargs["K"] == 3


@needs_triton
def test_the_drift_has_the_same_bits_each_time():
    past, against = snapshots(2, torch.float32, (5000,)), snapshots(1, torch.float32, (5000,), seed=1)[0]
    with through("triton"):
        told = {combine([-1.0, 2.0], past, against=against)[1].item() for _ in range(3)}
    assert len(told) == 1
