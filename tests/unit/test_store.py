"""The store: bounded rings, counted bytes, and no stale shapes."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack.core.step import Clock
from pack.core.store import Row, Store

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
