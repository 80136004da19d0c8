"""Looking back, where it must not: whatever is not the next step of the schedule; and what it does with tensors."""
import math

import pytest
import torch
from sampling_by_hand import LATENT, PATTERNS, SCHEDULES, randn

from pack.core.stepcache.look_back import LEAST, NODES, LookBack, most_bytes
from pack.core.stepcache.solvers import SOLVERS


@pytest.mark.parametrize("name", SOLVERS)
def test_without_a_skip_the_very_tensors_come_back(name):
    back = LookBack(SOLVERS[name], SCHEDULES["flow"])
    for n in range(12):
        d = randn(n)
        assert back.computed(n, d)[0] is d is back.computed(n + 20, d)[1]
    back = LookBack(SOLVERS[name], SCHEDULES["flow"])
    for n in range(12):
        d = randn(n)
        known, told = back.computed(n, d)
        assert known is d and told is d


def owing(name: str = "euler", sigmas=None, shape=LATENT) -> LookBack:
    """Two computed steps and two skips, at 2 and 3, that were wrong."""
    back = LookBack(SOLVERS[name], sigmas or SCHEDULES["flow"])
    for n in range(2):
        back.computed(n, randn(n, *shape))
    for n in (2, 3):
        back.skipped(n, randn(10 + n, *shape))
    return back


def is_made_up(back: LookBack, place: float, shape=LATENT) -> bool:
    d = randn(50, *shape)
    known, told = back.computed(place, d)
    return not (known is d and told is d)


def holds_nothing_but(back: LookBack, nodes: int) -> bool:
    return len(back.nodes) == nodes and not back.skips and back.echo is None and back.first_echo is None


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_owed_is_made_up_at_the_next_step_only(name):
    assert is_made_up(owing(name), 4), "else the tests below prove nothing"
    for place in (3, 2, 0, 5, 3.5, 4.01, 11):
        back = owing(name)
        assert not is_made_up(back, place), f"at {place}"
        assert holds_nothing_but(back, 1 if place == round(place) else 0)


@pytest.mark.parametrize("name", SOLVERS)
def test_second_evaluations_between_steps_as_of_heun_are_left_alone(name):
    """Heun evaluates where the step ends, then there again as the next step begins."""
    back = LookBack(SOLVERS[name], SCHEDULES["flow"])
    for n in range(4):
        assert not is_made_up(back, n) and not is_made_up(back, n + 1)
        d = randn(n)
        assert back.skipped(n + 1, d) is d, "the same place again"
    back = LookBack(SOLVERS[name], SCHEDULES["flow"])
    for n in range(4):
        assert not is_made_up(back, n) and not is_made_up(back, n + 0.5), "dpm_2's midpoint"


@pytest.mark.parametrize("name", SOLVERS)
def test_a_skip_off_the_grid_hands_out_the_very_tensor_and_owes_nothing(name):
    for place in (2.5, 1, 6):
        back, d = LookBack(SOLVERS[name], SCHEDULES["flow"]), randn(5)
        back.computed(0, randn(0))
        back.computed(1, randn(1))
        assert back.skipped(place, d) is d and holds_nothing_but(back, 0)
        assert not is_made_up(back, round(place) + 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_echo_is_not_taken_out_of_an_evaluation_that_is_not_the_next(name):
    for place in (4, 6, 4.5, 2):
        back, d = owing(name), randn(60)
        assert is_made_up(back, 4)
        assert not is_made_up(back, place) and back.echo is None
        back = owing(name)
        assert is_made_up(back, 4) and back.skipped(place, d) is d


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("again", [1, 5, 11])
def test_a_sigma_that_repeats_begins_anew(name, again):
    """A schedule by hand may do so; the host's clock then tells the last of them."""
    sigmas = SCHEDULES["flow"]
    sigmas = [*sigmas[:again + 1], *sigmas[again:]]
    back = LookBack(SOLVERS[name], sigmas)
    for n in range(again):
        back.computed(n, randn(n))
    assert not is_made_up(back, again + 1) and not is_made_up(back, again + 1)
    assert holds_nothing_but(back, 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_where_sigma_does_not_fall_or_is_not_above_zero_nothing_is_made_up(name):
    for sigmas in ([1.0, 0.8, 0.6, 0.4, 0.4, 0.2, 0.0], [1.0, 0.8, 0.6, 0.4, 0.4 * (1 - LEAST / 10), 0.2, 0.0], [1.0, 0.8, 0.6, 0.4, 0.5, 0.2, 0.0]):
        back = LookBack(SOLVERS[name], sigmas)
        back.computed(0, randn(0))
        back.computed(1, randn(1))
        back.skipped(2, randn(2))
        assert not is_made_up(back, 3), sigmas
        assert back.echo is None and not back.skips
    back = LookBack(SOLVERS[name], [1.0, 0.8, 0.6, 0.0, 0.0])
    back.computed(0, randn(0))
    back.skipped(1, randn(1))
    back.skipped(2, randn(2))
    assert not is_made_up(back, 3)


@pytest.mark.parametrize("skips", [(1,), (1, 3)])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_too_short_to_make_up_for_anything_ends_what_is_left_of_it(name, skips):
    """A sampler of several steps would be told to make up for the last echo there, and again after it."""
    back = LookBack(SOLVERS[name], [1.0, 0.8, 0.6, 0.4, 0.3, 0.3 * (1 - LEAST / 10), 0.2, 0.0])
    made_up = []
    for n in range(7):
        if n in skips:
            back.skipped(n, randn(n))
        else:
            made_up.append((n, is_made_up(back, n)))
    assert (2, True) in made_up and not any(told for n, told in made_up if n >= 4)
    assert back.echo is None and back.first_echo is None


@pytest.mark.parametrize("name", SOLVERS)
def test_after_forget_and_after_a_change_of_shape_nothing_is_made_up(name):
    back = owing(name)
    back.forget()
    assert holds_nothing_but(back, 0) and not is_made_up(back, 4)
    back, other = owing(name), (1, 2, 3, 6)
    assert not is_made_up(back, 4, other) and holds_nothing_but(back, 1)
    back, d = owing(name), randn(4, *other)
    assert back.skipped(4, d) is d and not is_made_up(back, 5, other)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_skip_without_a_computed_step_before_it_owes_nothing(name):
    back, d = LookBack(SOLVERS[name], SCHEDULES["flow"]), randn(0)
    assert back.skipped(0, d) is d and holds_nothing_but(back, 0) and not is_made_up(back, 1)


# tensors ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SOLVERS)
def test_tensors_that_are_handed_in_or_were_handed_out_are_never_written_to(name):
    back, seen = LookBack(SOLVERS[name], SCHEDULES["flow"]), []
    for n in range(12):
        d = randn(n)
        result = (back.skipped(n, d),) if n in PATTERNS["unlike"] else back.computed(n, d)
        seen += [(tensor, tensor.clone()) for tensor in (d, *result)]
        assert all(torch.equal(tensor, before) for tensor, before in seen)


def distinct_bytes(back: LookBack) -> int:
    held = [*(d for _, d in (*back.nodes, *back.skips)), back.echo, back.first_echo]
    return sum({id(d): d.numel() * d.element_size() for d in held if d is not None}.values())


@pytest.mark.parametrize("name", SOLVERS)
def test_the_most_bytes_that_it_held_are_counted_and_none_outlive_it(name):
    back, most = LookBack(SOLVERS[name], SCHEDULES["flow"]), 0
    for n in range(12):
        d = randn(n, dtype=torch.float32)
        back.skipped(n, d) if n in PATTERNS["unlike"] else back.computed(n, d)
        most = max(most, distinct_bytes(back))
    one = 4 * math.prod(LATENT)
    assert back.peak == most >= (NODES + 3) * one
    assert most <= most_bytes(LATENT, 3), "what a run asks memory for beforehand"
    back.forget()
    assert distinct_bytes(back) == 0 and back.peak == most
