"""The store: bounded rings, counted bytes, no stale shapes, and what is kept narrower or elsewhere comes back as it was."""
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack.core.step import Clock
from pack.core.store import FP8, MIB, STORAGE, Row, Store, page_locked

CLOCK = Clock([1 - n / 20 for n in range(21)], flow=True)
STEPS = [CLOCK.tick(1 - n / 20) for n in range(20)]
ROW = Row("cpu", 0, "uuid", 0, None, (1, 2))
OTHER = ROW._replace(cond=1)


def values(store: Store, row: Row = ROW) -> list[float]:
    return [snapshot.value.flatten()[0].item() for snapshot in store.get(row)]


@given(st.integers(1, 5), st.lists(st.integers(0, 1), min_size=1, max_size=20))
def test_a_ring_is_bounded_and_its_newest_is_last(depth, which):
    store, wanted = Store(depth), {ROW: [], OTHER: []}
    for n, row in enumerate((ROW, OTHER)[w] for w in which):
        store.put(row, STEPS[n], torch.full((1, 2), float(n)))
        wanted[row] = [*wanted[row], float(n)][-depth:]
    assert {row: values(store, row) for row in wanted} == wanted
    assert store.bytes == 8 * sum(map(len, wanted.values())) <= store.peak <= 2 * depth * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_counted_by_type_and_the_peak_is_kept(dtype):
    store = Store(2)
    for n in range(3):
        store.put(ROW, STEPS[n], torch.zeros(3, 5, dtype=dtype))
    assert store.bytes == store.peak == 2 * 15 * dtype.itemsize
    store.clear()
    assert store.bytes == 0 and store.peak == 2 * 15 * dtype.itemsize and store.get(ROW) == ()


def test_the_same_place_replaces_its_snapshot():
    store = Store(3)
    for step, value in ((STEPS[0], 0.0), (STEPS[1], 1.0), (STEPS[1], 2.0), (CLOCK.tick(STEPS[1].sigma * (1 + 1e-6)), 3.0), (STEPS[2], 4.0)):
        store.put(ROW, step, torch.full((1, 2), value))
    assert values(store) == [0.0, 3.0, 4.0]


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2,)])
def test_another_shape_forgets_the_ring_and_no_other(shape):
    store = Store(3)
    for row in (ROW, OTHER):
        store.put(row, STEPS[0], torch.zeros(1, 2))
        store.put(row, STEPS[1], torch.zeros(1, 2))
    store.put(ROW, STEPS[2], torch.ones(shape))
    assert len(store.get(ROW)) == 1 and store.get(ROW)[0].value.shape == shape and len(store.get(OTHER)) == 2


def test_a_row_that_was_never_put_is_empty_and_is_not_made_by_asking():
    store = Store(2)
    assert store.get(ROW) == () and not store.rings


FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Half a unit in the last place, relative, of what a type keeps; and the smallest step of fp8 below its normal range, in scales.
HALF_UNIT = {torch.bfloat16: 2.0 ** -8, FP8: 2.0 ** -4}
SMALLEST = {torch.bfloat16: 0.0, FP8: 2.0 ** -10}


class Lender:
    """Stands in for page-locked memory of the host."""

    def __init__(self):
        self.lent = []

    def __call__(self, value):
        self.lent.append(torch.full_like(value.float(), torch.nan).to(value.dtype))
        return self.lent[-1]


def random(shape, dtype=torch.float32, seed=1, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("away", [False, True], ids=["where it was computed", "in host memory"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_comes_back_in_its_type_and_within_half_a_unit_of_what_keeps_it(dtype, storage, scale, away):
    lender = Lender()
    store, value = Store(2, storage, away=lender if away else None), random((3, 50, 7), dtype, scale=scale)
    store.put(ROW, STEPS[0], value.clone())
    (snapshot,) = store.get(ROW)
    back, kept = snapshot.value, snapshot.kept.dtype
    assert (back.dtype, back.shape, back.device) == (value.dtype, value.shape, value.device)
    assert snapshot.kept.element_size() == min(dtype.itemsize, {"same": 8, "bf16": 2, "fp8": 1}[storage])
    if kept == dtype:
        assert torch.equal(back, value)
    else:
        error = (back.double() - value.double()).abs()
        step = value.double().abs().max() / torch.finfo(FP8).max
        own = torch.finfo(dtype)    # what comes back is rounded to the type it had
        assert (error <= value.double().abs() * (HALF_UNIT[kept] + own.eps) + SMALLEST[kept] * step + own.smallest_normal * own.eps).all()
        assert error.max() > 0, "nothing was rounded, so the test would prove nothing"
    assert len(lender.lent) == away and all(snapshot.kept is memory for memory in lender.lent)


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("storage", STORAGE)
def test_what_is_kept_another_way_is_another_tensor_and_its_bytes_are_counted(storage, away):
    store, value = Store(2, storage, away=Lender() if away else None), random((4, 8))
    store.put(ROW, STEPS[0], value)
    before = store.get(ROW)[0].value.clone()
    assert store.bytes == {"same": 128, "bf16": 64, "fp8": 32 + 4}[storage]
    if away or storage != "same":
        value.fill_(7.0)
    assert torch.equal(store.get(ROW)[0].value, before)


def test_zeros_in_fp8_are_zeros():
    store = Store(1, "fp8")
    store.put(ROW, STEPS[0], torch.zeros(5))
    assert torch.equal(store.get(ROW)[0].value, torch.zeros(5))


def test_what_is_in_host_memory_already_stays_there():
    assert page_locked(torch.zeros(3)) is None
    store = Store(1, away=page_locked)
    store.put(ROW, STEPS[0], value := torch.zeros(3))
    assert store.get(ROW)[0].kept is value


class OnGpu(NamedTuple):
    """As much of a tensor on a GPU as is asked about."""

    shape: tuple = (3, 5)
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cuda:1")


@pytest.mark.parametrize("says", ["", "CUDA error: out of memory", "CUDA error: an illegal memory access was encountered"])
def test_host_memory_is_page_locked_where_there_is_enough_of_that(says, monkeypatch):
    empty, asked = torch.empty, []

    def allocate(shape, dtype, pin_memory=False):
        asked.append(pin_memory)
        if pin_memory and says:
            raise RuntimeError(says)
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    if "illegal" in says:
        with pytest.raises(RuntimeError, match="illegal"):
            page_locked(OnGpu())
        return
    memory = page_locked(OnGpu())
    assert (memory.shape, memory.dtype, memory.device.type) == ((3, 5), torch.bfloat16, "cpu")
    assert asked == ([True, False] if says else [True])
    asked.clear()
    page_locked(OnGpu(device=torch.device("mps")))
    assert asked == [False], "a GPU of another kind copies by itself"


@pytest.mark.parametrize("storage", STORAGE)
def test_another_type_forgets_the_ring(storage):
    store = Store(3, storage)
    store.put(ROW, STEPS[0], torch.ones(1, 2))
    store.put(ROW, STEPS[1], torch.ones(1, 2))
    assert len(store.get(ROW)) == 2
    store.put(ROW, STEPS[2], torch.ones(1, 2, dtype=torch.float16))
    assert len(store.get(ROW)) == 1 and store.get(ROW)[0].value.dtype is torch.float16


# One value has a quarter MiB in fp32; two rows, three snapshots each.
@pytest.mark.parametrize(("quarters", "depth", "storage", "says"), [
    (6, 3, "same", ""), (5, 2, "same", "holds 2 results per condition"), (4, 2, "same", "holds 2 results"), (3, 1, "same", "holds 1 result per condition"),
    (2, 1, "same", "holds 1 result"), (1, 1, "bf16", "in bf16"), (0.9, 0, "bf16", "too small"), (0.4, 0, "bf16", "too small")])
def test_a_budget_costs_depth_first_then_width_then_everything(quarters, depth, storage, says):
    store = Store(3, budget=int(quarters * MIB / 4))
    for n in range(8):
        for row in (ROW, OTHER):
            store.put(row, STEPS[n], random((256, 256), seed=n))
            assert store.bytes <= store.budget
    assert (store.depth, store.storage) == (depth, storage)
    assert says in store.gave and bool(says) == bool(store.gave) and store.peak <= store.budget
    assert f"{quarters / 4:.4g} MiB" in store.gave or not says
    if depth:
        assert [s.step for s in store.get(ROW)] == STEPS[8 - depth:8]
        assert torch.allclose(store.get(ROW)[-1].value, random((256, 256), seed=7), rtol=2 ** -8)


def test_two_bytes_are_not_made_two_bytes_of_another_kind():
    store = Store(1, budget=1000)
    store.put(ROW, STEPS[0], random((300,), torch.float16))
    store.put(OTHER, STEPS[0], random((300,), torch.float16))
    assert store.depth == 0 and store.get(ROW)[0].kept.dtype is torch.float16


@given(st.integers(0, 40), st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_room_for_one_row_is_never_made_of_the_newest_snapshot_of_another(budget, which):
    store, rows = Store(3, budget=budget * 4), [ROW._replace(cond=n) for n in range(4)]
    for n, w in enumerate(which):
        before = {row: store.get(row) for row in rows}
        held = {row: [s.value.clone() for s in ring] for row, ring in before.items()}
        store.put(rows[w], STEPS[n % 20], torch.full((4,), float(n)))
        for row in rows:
            assert row == rows[w] or not before[row] or store.get(row)[-1].step == before[row][-1].step
            assert all(torch.equal(s.value, value) for s, value in zip(before[row], held[row], strict=True)), "a ring that was handed out has changed"
        assert not budget or store.bytes <= store.budget


def test_dropping_rows_leaves_the_others():
    store = Store(2)
    for n, row in enumerate((ROW, OTHER)):
        store.put(row, STEPS[n], torch.zeros(2))
    store.drop(lambda row, newest: newest.step == STEPS[0])
    assert list(store.rings) == [OTHER]
