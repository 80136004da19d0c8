"""Lists of ranges as text, and the decision for each of them."""
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pack.core.knob import checked
from pack.core.step import Clock
from pack.core.stepcache.each_range import EachRange
from pack.core.stepcache.levels.block_ranges import BlockRanges, ranges_of
from pack.core.stepcache.levels.front_or_rear import FrontOrRearRange
from pack.core.stepcache.policies import View
from pack.core.stepcache.policies.temporal_delta import TemporalDelta
from pack.core.store import Row

A, B = (0, 2), (3, 5)


@given(st.lists(st.integers(0, 60), min_size=2, max_size=12, unique=True), st.booleans(), st.sampled_from(["-", " - "]), st.sampled_from([",", " , "]))
def test_a_list_of_ranges_is_read_as_it_was_written(numbers, open_end, dash, comma):
    numbers = sorted(numbers)[: len(numbers) // 2 * 2]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    text = comma.join(f"{first}{dash}{last}" for first, last in pairs)
    assert ranges_of(text) == tuple(pairs) and checked(BlockRanges(text)).kept == len(pairs)
    assert ranges_of(", ".join(str(n) for n in numbers)) == tuple((n, n) for n in numbers)
    if open_end:
        assert ranges_of(f"{text},{numbers[-1] + 1}-") == (*pairs, (numbers[-1] + 1, None))


@pytest.mark.parametrize("text", ["", ",", "3-1", "0-3, 3-5", "0-3, 2", "4, 1", "1-, 5", "-3", "a-b", "1;2", "0--2", "1-2-3", "0.5", "1,,2", "²", "٣", "1 2"])
def test_a_list_that_is_none_is_told_what_it_should_be(text):
    with pytest.raises(ValueError, match="block ranges: ranges is '.*'; expected ranges of block numbers from 0 on"):
        checked(BlockRanges(text))


@pytest.mark.parametrize("text", ["0, 2-7, 10-20, 25-32, 37-38", "1, 3, 8-9, 22, 24, 28-30, 32, 34-39"])
def test_the_published_lists_are_lists(text):
    assert checked(BlockRanges(text)).kept >= 5 and text in sys.modules[BlockRanges.__module__].__doc__


@given(st.integers(1, 60), st.floats(0, 1))
def test_the_phase_changes_once_from_rear_to_front(steps, border):
    clock = Clock([1 - n / steps for n in range(steps + 1)], True)
    phases = [FrontOrRearRange(border).phase(clock.tick(sigma)) for sigma in clock.sigmas[:-1]]
    assert phases == sorted(phases, reverse=True) and abs(phases.count("rear") - border * steps) <= 1


# decisions -----------------------------------------------------------------------------------------------------------
STEPS = 12
CLOCK = Clock([1 - n / STEPS for n in range(STEPS + 1)], True)
EACH = [CLOCK.tick(sigma) for sigma in CLOCK.sigmas[:-1]]


def row(blocks, cond=0, stream="") -> Row:
    return Row("cpu", 0, "uuid", cond, None, (1,), stream=stream, blocks=blocks)


def walk(policy, rates: dict, steps=STEPS, more=lambda each, blocks, n: None) -> list[frozenset]:
    """Ranges whose residual grows by a factor per step; what was skipped at each of them."""
    each, seen = EachRange(policy), []
    for n in range(steps):
        each.begin(EACH[n])
        any_skipped = each.skip(View(EACH[n], (EACH[0],), None, 0.0))
        assert any_skipped == bool(each.allowed) == any(each.skips(blocks) for blocks in rates)
        seen.append(frozenset(blocks for blocks in rates if each.skips(blocks)))
        for blocks, rate in rates.items():
            if blocks not in each.allowed:
                each.learn(row(blocks), torch.full((64,), (1.0 + rate) ** n))
            more(each, blocks, n)
        each.finish()
    return seen


def test_each_range_has_its_own_change_and_its_own_count():
    assert walk(TemporalDelta(0.1, 2), {A: 0.0, B: 5.0}) == [frozenset(), frozenset(), *([frozenset({A})] * 2 + [frozenset()]) * 3, frozenset({A})]
    still, slower = walk(TemporalDelta(0.1, 3), {A: 0.0}), walk(TemporalDelta(0.1, 1), {A: 0.0})
    both = walk(TemporalDelta(0.1, 3), {A: 0.0, B: 0.0})
    assert both == [now and frozenset({A, B}) for now in still] and sum(map(len, slower)) < sum(map(len, still))


def test_a_policy_is_told_how_often_its_range_was_skipped_and_when_it_was_computed():
    told: list = []

    @dataclass(frozen=True)
    class Asked:
        name = "asked"

        def skip(self, view):
            told.append((view.step.index, view.skipped, [step.index for step in view.computed], view.signal.output_change))
            return view.step.index in (2, 3)

    walk(Asked(), {A: 1.0}, 6)
    assert told == [(1, 0, [0], None), (2, 0, [0, 1], pytest.approx(0.5)), (3, 1, [0, 1], pytest.approx(0.5)), (4, 2, [0, 1], pytest.approx(0.5)),
                    (5, 0, [1, 4], pytest.approx(7 / 24))]


@pytest.mark.parametrize("other", [{"cond": 1}, {"stream": "audio"}])
def test_only_the_row_that_comes_first_is_looked_at(other):
    jumps = lambda each, blocks, n: each.learn(row(blocks, **other), torch.full((64,), float((-1) ** n)))
    assert walk(TemporalDelta(0.1, 2), {A: 0.0, B: 5.0}, more=jumps) == walk(TemporalDelta(0.1, 2), {A: 0.0, B: 5.0})


def test_another_row_that_comes_first_begins_anew():
    each = EachRange(TemporalDelta(0.1, 2))
    for n in range(3):
        each.begin(EACH[n])
        assert not each.skip(View(EACH[n], (EACH[0],), None, 0.0)), "two conditions were compared"
        each.learn(row(A, cond=int(n > 0)), torch.ones(64))
        each.finish()
    each.begin(EACH[3])
    assert each.skip(View(EACH[3], (EACH[0],), None, 0.0))


def test_a_second_result_at_the_same_sigma_takes_the_place_of_the_first():
    each = EachRange(TemporalDelta(0.1, 2))
    for n, value in ((0, 1.0), (1, 5.0), (1, 1.0)):
        each.begin(EACH[n])
        each.learn(row(A), torch.full((64,), value))
        each.finish()
    each.begin(EACH[2])
    assert each.skip(View(EACH[2], (EACH[0],), None, 0.0)) and [step.index for step, _ in each.kept[A].nodes] == [0, 1]
    assert each.peak == 2 * 64 * 4
    each.forget()
    assert not each.kept and not each.skips(A)
