"""Modulation Cache's table: results are those of the module, to the bit; what is ahead is computed at once; it never holds more than it may."""
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from pack.core.quant.modulation_table import Table, bytes_in, key_of

WIDTH = 4
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2]


@dataclass
class Result:
    shift: torch.Tensor
    scale: torch.Tensor


class Modulation:
    """Stands for a module and its stand-in; its weights are numbers only while they are lent."""

    def __init__(self, name: str, seed: int):
        self.name, self.own = name, torch.randn(WIDTH, 2 * WIDTH, generator=torch.Generator().manual_seed(seed))
        self.weight, self.loans, self.calls = None, 0, 0

    @contextmanager
    def lent(self, vector):
        self.weight, self.loans = self.own, self.loans + 1
        try:
            yield
        finally:
            self.weight = None

    def held(self, vector):
        self.calls += 1
        return Result(*(vector @ self.weight).chunk(2, -1)), None

    def truth(self, vector):
        return vector @ self.own


class Model:
    """Two modulations: one is given the vector, the other a view of its second row."""

    def __init__(self):
        self.first, self.second = Modulation("first", 1), Modulation("second", 2)

    def __call__(self, table: Table, sigma: float, layout: int = 0):
        vector = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(layout)) + sigma
        whole = table.ask(self.first, vector)[0]
        part = table.ask(self.second, vector[1:, None])[0]
        assert torch.equal(torch.cat([whole.shift, whole.scale], -1), self.first.truth(vector))
        assert torch.equal(torch.cat([part.shift, part.scale], -1), self.second.truth(vector[1:, None]))

    def bytes(self, vector) -> int:
        return 3 * 2 * WIDTH * 4        # two rows of the first and one of the second


def hear(table, model, sigmas, layout=0):
    table.hear((layout,), sigmas, lambda sigma: model(table, sigma, layout), model.bytes)


def run(table, model, sigmas, layout=0):
    for sigma in sigmas:
        with table.call((layout,), trusting=True):
            model(table, sigma, layout)


def test_a_module_is_lent_its_weights_once_for_the_whole_schedule():
    table, model = Table(1 << 20), Model()
    hear(table, model, SIGMAS)
    assert model.first.calls == model.second.calls == 0 and not table.rows
    run(table, model, SIGMAS)
    assert model.first.loans == model.second.loans == 1 and model.first.calls == model.second.calls == len(SIGMAS)
    assert table.found == 2 * (len(SIGMAS) - 1) and table.streamed == 0


def test_another_sigma_is_computed_for_itself_and_not_kept():
    table, model = Table(1 << 20), Model()
    hear(table, model, SIGMAS)
    run(table, model, SIGMAS[:1])
    before = table.bytes
    run(table, model, [0.7, 0.7])
    assert table.streamed == 2 and table.bytes == before and model.first.loans == 3
    run(table, model, SIGMAS)
    assert model.first.loans == 3


def test_a_module_that_is_first_asked_later_is_computed_for_what_is_left():
    table, model = Table(1 << 20), Model()
    hear(table, model, SIGMAS)
    run(table, model, SIGMAS[2:])
    assert model.first.calls == 3 and model.first.loans == 1 and table.streamed == 0


def test_layouts_do_not_share_rows():
    table, model = Table(1 << 20), Model()
    for layout in (0, 1):
        hear(table, model, SIGMAS, layout)
    run(table, model, SIGMAS, 0)
    run(table, model, SIGMAS, 1)
    assert model.first.loans == 2 and table.streamed == 0


@given(some.integers(0, 700), some.lists(some.tuples(some.sampled_from([*SIGMAS, 0.5, 0.05]), some.integers(0, 1)), min_size=1, max_size=12))
def test_results_are_exact_and_the_limit_holds_in_any_order_of_calls(limit, calls):
    table, model = Table(limit), Model()
    for sigma, layout in calls:
        ahead = table.ahead.get((layout,))
        if ahead is None or (not ahead.whole and sigma not in ahead.sigmas and sigma in SIGMAS):
            hear(table, model, [s for s in SIGMAS if s <= sigma] or [sigma], layout)
        run(table, model, [sigma], layout)
        held = sum(bytes_in(result) for rows in table.rows.values() for result in rows.values())
        assert table.bytes == held <= table.most <= limit
    table.close()
    assert not table.rows and not table.bytes


def test_a_vector_that_somebody_writes_into_is_read_again_where_nobody_is_trusted():
    table, modulation = Table(1 << 20), Modulation("first", 1)
    vector = torch.ones(2, WIDTH)
    with table.call((0,), trusting=False):
        one = table.ask(modulation, vector)[0].shift.clone()
        vector.mul_(2)
        assert torch.equal(table.ask(modulation, vector)[0].shift, 2 * one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_tells_bits_shape_and_type(dtype):
    vector = torch.zeros(2, WIDTH, dtype=dtype)
    others = [vector[:, None], vector[:1], -vector, vector + torch.finfo(dtype).tiny, vector.to(torch.float64)]
    assert key_of(vector) == key_of(vector.clone()) == key_of(torch.zeros(WIDTH, 2, dtype=dtype).T)
    assert len({key_of(vector), *map(key_of, others)}) == len(others) + 1


def test_memory_that_parts_of_a_result_share_counts_once():
    whole = torch.zeros(6, 8)
    assert bytes_in((Result(*whole.chunk(2)), None, [torch.zeros(3)])) == whole.nbytes + 12
