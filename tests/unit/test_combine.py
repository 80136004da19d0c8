"""The combine kernel's reference: a weighted sum in fp32, whatever goes in."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.kernels.combine import combine, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def snapshots(n: int, dtype, shape=(2, 5, 7), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(weights=st.lists(st.floats(-8, 8), min_size=1, max_size=4))
@settings(max_examples=25)
def test_it_is_the_weighted_sum_in_fp32_rounded_once(dtype, anchored, weights):
    past, anchor = snapshots(len(weights), dtype), snapshots(1, dtype, seed=1)[0] if anchored else None
    exact = sum((weight * snapshot.double() for weight, snapshot in zip(weights, past, strict=True)), anchor.double() if anchored else 0)
    out = reference(weights, past, anchor)
    assert out.dtype == dtype and out.shape == past[0].shape
    scale = sum(abs(weight) for weight in weights) * 4 + 4
    wanted = exact.to(dtype)
    assert torch.allclose(out.double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_terms_that_cancel_do_not_lose_the_rest(dtype):
    past = [torch.full((4,), 3.0, dtype=dtype)] * 3
    assert torch.equal(combine([1000.0, 1.0, -1000.0], past), past[0]), "accumulated in the type of the snapshots, the middle term is lost"


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_a_new_tensor_and_leaves_its_inputs_alone(dtype, weights):
    for anchor in (None, *snapshots(1, dtype, seed=1)):
        past = snapshots(len(weights), dtype)
        before = [tensor.clone() for tensor in (*past, *([] if anchor is None else [anchor]))]
        out = combine(weights, past, anchor)
        assert out.data_ptr() not in {tensor.data_ptr() for tensor in (*past, *([] if anchor is None else [anchor]))}
        out.fill_(float("nan"))
        after = (*past, *([] if anchor is None else [anchor]))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_snapshot_at_weight_one_is_itself_bit_for_bit(dtype):
    (only,) = snapshots(1, dtype)
    assert torch.equal(combine([1.0], [only]), only)


def test_weights_and_snapshots_must_be_as_many():
    with pytest.raises(ValueError):
        combine([1.0, 2.0], snapshots(1, torch.float32))


def test_fp16_is_held_at_the_end_of_its_range():
    out = combine([2.0, -1.0], [torch.full((4,), 60000.0, dtype=torch.float16), torch.full((4,), 40000.0, dtype=torch.float16)])
    assert out.dtype is torch.float16 and torch.isfinite(out).all() and out[0] == 65504
