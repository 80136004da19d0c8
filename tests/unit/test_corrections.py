"""Corrections, over the registry: identity while nothing is known, exact where their model holds, and what the cache does with them."""
import inspect
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.core.report import Report
from pack.core.step import Clock
from pack.core.stepcache import cache as cache_module
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.corrections import CORRECTIONS, Guess
from pack.core.stepcache.corrections.affine import Affine, fit
from pack.core.stepcache.corrections.channel_affine import ChannelAffine
from pack.core.stepcache.corrections.rectify import GAINS, Rectify
from pack.core.stepcache.corrections.variance import Variance
from pack.core.stepcache.governor import Governor
from pack.core.stepcache.predictors.divided_differences import DividedDifferences
from pack.core.stepcache.predictors.dmd import DynamicModes
from pack.core.stepcache.predictors.hold import Hold
from pack.core.store import Row

CLOCK = Clock([1 - n / 20 for n in range(21)], flow=True)
STEPS = [CLOCK.tick(1 - n / 20) for n in range(20)]
HOLD, LINE = Hold(), DividedDifferences(1)
ACTIVE = {name: entry for name, entry in CORRECTIONS.items() if entry().start() is not None}
SHAPES = {"latent": (2, 4, 6, 5), "video": (2, 4, 3, 6, 5), "audio": (2, 4, 30), "tokens": (2, 30, 4), "feature": (2, 8, 3, 5)}
LATENT = SHAPES["latent"]


def row(shape=LATENT, name="a") -> Row:
    return Row("cpu", 0, name, 0, None, LATENT if shape in (SHAPES["tokens"], SHAPES["feature"]) else shape)


def noise(seed: int, shape=LATENT, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def guess(value, at=6, reach=3.0, last=None, predictor=HOLD, shape=None, name="a") -> Guess:
    return Guess(row(shape or value.shape, name), predictor, STEPS[at], reach, value, torch.zeros_like(value) if last is None else last)


def taught(correction, value, actual, at=6, reach=3.0, last=None, **more):
    """The state after one computed step, before which two others were seen at places 0 and 3 with the spread of `actual`."""
    state, said = correction.start(), guess(value, at, reach, last, **more)
    state.learn(said.row, said.step, actual, [said])
    return state


# every one of them ----------------------------------------------------------------------------------------------------
def test_the_first_of_the_menu_is_none_and_does_nothing():
    assert next(iter(CORRECTIONS)) == "none" and CORRECTIONS["none"]().start() is None and len(ACTIVE) == len(CORRECTIONS) - 1


@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
def test_every_correction_is_immutable_and_says_what_it_does(correction):
    assert hash(correction()) == hash(correction()) and correction() == correction()
    with pytest.raises(FrozenInstanceError):
        correction().name = "another"
    told = inspect.getdoc(inspect.getmodule(correction))
    assert told and (correction.name == "none" or ("Costs" in told and "Helps" in told and "arXiv" in told))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("correction", ACTIVE.values(), ids=ACTIVE)
def test_while_nothing_is_known_of_a_row_its_guess_stays(correction, dtype, shape):
    value = noise(1, shape, dtype)
    state = taught(correction(), noise(2, shape, dtype), noise(3, shape, dtype), name="another")
    assert torch.equal(state.apply(guess(value)), value.float())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("correction", ACTIVE.values(), ids=ACTIVE)
@given(seed=st.integers(0, 99))
@settings(max_examples=5)
def test_where_every_guess_was_right_the_next_one_stays(correction, shape, seed):
    path = [noise(seed, shape), noise(seed, shape).flip(-1), noise(seed, shape).flip(-2)]     # all of one spread
    state = correction().start()
    for at, before, actual in zip((0, 3, 6), [path[2], *path[:2]], path, strict=True):
        said = guess(actual.clone(), at, last=before)
        state.learn(said.row, said.step, actual, [said])
    value = noise(seed, shape).flip(0)
    wanted = state.apply(guess(value, at=8, reach=2.0, last=path[2]))
    if correction is Variance:
        value = (value - mean(value)) * (spread(noise(seed, shape)) / spread(value)) + mean(value)
    assert torch.allclose(wanted, value, atol=1e-4)


def mean(value):
    return value.flatten(1).mean(1).view(-1, *[1] * (value.ndim - 1))


def spread(value):
    return value.flatten(1).std(1, correction=0).view(-1, *[1] * (value.ndim - 1))


@pytest.mark.parametrize("where", [("value",), ("actual",), ("last",), ("value", "actual", "last")], ids=" and ".join)
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 0.0, 1e30])
@pytest.mark.parametrize("correction", ACTIVE.values(), ids=ACTIVE)
def test_a_spoilt_snapshot_or_guess_does_not_spoil_what_follows(correction, spoilt, where):
    state = correction().start()
    for at in (0, 3, 6, 9):
        made = {"value": noise(at), "actual": noise(at + 1), "last": noise(at + 2)}
        if at == 3:
            made |= {name: torch.full(LATENT, spoilt) for name in where}
        said = guess(made["value"], at, last=made["last"])
        state.learn(said.row, said.step, made["actual"], [said])
    out = state.apply(guess(noise(5), at=11, last=noise(6)))
    assert out.isfinite().all() and (spoilt == 1e30 or out.abs().max() < 100)


@pytest.mark.parametrize("correction", ACTIVE.values(), ids=ACTIVE)
def test_what_is_kept_is_its_own_small_counted_and_dropped(correction):
    value, actual, last = noise(1), noise(2), noise(3)
    state = correction().start()
    for at in (3, 6):
        said = guess(value, at, last=last)
        state.learn(said.row, said.step, actual, [said])
    given_storage = {t.untyped_storage().data_ptr() for t in (value, actual, last)}
    kept = [t for entry in state.tensors.values() for t in entry if torch.is_tensor(t)]
    assert kept and not given_storage & {t.untyped_storage().data_ptr() for t in kept}
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept), "no small view of a large tensor"
    assert state.peak == sum(t.numel() * t.element_size() for t in kept) < value.numel() * value.element_size()
    state.clear()
    assert not state.tensors and torch.equal(state.apply(guess(value, last=last)), value)


@pytest.mark.parametrize("correction", ACTIVE.values(), ids=ACTIVE)
def test_neither_guess_nor_result_is_written_to(correction):
    value, actual, last = noise(1), noise(2), noise(3)
    before = [t.clone() for t in (value, actual, last)]
    state = correction().start()
    for at in (0, 3, 6):
        said = guess(value, at, last=last)
        state.learn(said.row, said.step, actual, [said])
    out = state.apply(guess(value, at=8, last=last))
    assert all(torch.equal(a, b) for a, b in zip((value, actual, last), before, strict=True))
    assert not torch.equal(out, value), "the test would prove nothing"


# channel affine -------------------------------------------------------------------------------------------------------
def per_channel(shape, seed):
    """A gain and an offset for each picture and channel, to be broadcast."""
    axis = 1 if shape != SHAPES["tokens"] else 2
    small = [n if k in (0, axis) else 1 for k, n in enumerate(shape)]
    return 1 + 0.5 * noise(seed, small), noise(seed + 1, small)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@given(seed=st.integers(0, 999))
@settings(max_examples=20)
def test_a_gain_and_an_offset_per_channel_are_found_and_taken_off(shape, seed):
    gain, offset = per_channel(shape, seed)
    value = noise(seed + 2, shape)
    state = taught(ChannelAffine(), value, gain * value + offset)
    again = noise(seed + 3, shape)
    assert torch.allclose(state.apply(guess(again, at=9)), gain * again + offset, atol=1e-3)


@pytest.mark.parametrize(("reach", "share"), [(0.0, 0.0), (1.0, 1 / 3), (2.0, 2 / 3), (3.0, 1.0), (5.0, 1.0)])
@pytest.mark.parametrize("name", ["channel affine", "rectify"])
def test_a_nearer_skip_is_corrected_less_and_a_farther_one_no_more(name, reach, share):
    value = noise(1)
    state = taught(CORRECTIONS[name](), value, 1.4 * value + 0.2, last=value)
    again = noise(4)
    assert torch.allclose(state.apply(guess(again, reach=reach, last=again)), (1 + 0.4 * share) * again + 0.2 * share, atol=1e-3)


@pytest.mark.parametrize("name", ["channel affine", "rectify"])
def test_the_newest_measurement_counts_half(name):
    value = noise(1)
    state = taught(CORRECTIONS[name](), value, 1.4 * value, last=value)
    said = guess(value, at=9, last=value)
    state.learn(said.row, said.step, 2.0 * value, [said])
    assert torch.allclose(state.apply(guess(value, last=value)), 1.7 * value, atol=1e-3)


@pytest.mark.parametrize("name", ["channel affine", "rectify"])
def test_predictors_and_rows_are_told_apart(name):
    value = noise(1)
    state = taught(CORRECTIONS[name](), value, 2 * value, last=value, predictor=HOLD)
    assert torch.equal(state.apply(guess(value, last=value, predictor=LINE)), value)
    assert torch.equal(state.apply(guess(value, last=value, name="another")), value)
    assert torch.allclose(state.apply(guess(value, last=value, predictor=HOLD)), 2 * value, atol=1e-3)


def test_a_flat_channel_gets_its_offset_alone():
    value = noise(1)
    value[:, 2] = 0.7
    affine = fit(value, noise(2), 3.0, (0, 1))
    assert torch.equal(affine.gain[:, 2], torch.ones(2, 1, 1))
    assert torch.allclose(affine(value)[:, 2].mean((1, 2)), noise(2)[:, 2].mean((1, 2)), atol=1e-6)


@given(st.integers(0, 999))
@settings(max_examples=20)
def test_the_fit_is_least_squares(seed):
    """No other gain and offset comes nearer."""
    value, actual = noise(seed), noise(seed + 1) + 0.5 * noise(seed)
    affine = fit(value, actual, 1.0, (0, 1))
    error = lambda gain, offset: (gain * value + offset - actual).square().sum((2, 3))
    best = error(affine.gain, affine.offset)
    for gain, offset in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert (error(affine.gain + gain, affine.offset + offset) > best).all()


def test_given_maps_serve_until_a_row_has_its_own():
    value = noise(1)
    given_ = {HOLD: Affine(torch.full((1, 4, 1, 1), 1.5), torch.full((1, 4, 1, 1), -1.0), 2.0)}
    state = ChannelAffine().start(given_)
    assert torch.allclose(state.apply(guess(value, reach=2.0)), 1.5 * value - 1)
    state.learn(row(), STEPS[6], value, [guess(value, reach=2.0)])
    assert torch.allclose(state.apply(guess(value, reach=2.0)), value, atol=1e-5)


# variance -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("places", "spreads", "at", "wanted"), [
    ((2, 4), (1.0, 2.0), 5, 2 * 2 ** 0.5), ((0, 3), (1.0, 1.0), 5, 1.0), ((1, 2), (2.0, 1.8), 4, 1.8 * 0.81), ((0, 2, 5), (9.0, 1.0, 1.1), 8, 1.21)])
def test_the_spread_goes_on_from_the_two_newest_computed_steps(places, spreads, at, wanted):
    state, unit = Variance().start(), noise(1) / spread(noise(1))
    for place, size in zip(places, spreads, strict=True):
        state.learn(row(), STEPS[place], size * unit + 5, [])
    value = noise(2) * 1.65 + torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
    out = state.apply(guess(value, at))
    assert torch.allclose(spread(out), torch.full((2, 1, 1, 1), wanted), rtol=1e-3) and torch.allclose(mean(out), mean(value), atol=1e-5)
    assert torch.allclose((out - mean(out)) / spread(out), (value - mean(value)) / spread(value), atol=1e-4), "nothing but its size changes"


def test_one_computed_step_tells_no_trend_and_a_second_evaluation_at_its_place_takes_its_place():
    state, value = Variance().start(), noise(1)
    state.learn(row(), STEPS[3], 5 * value, [])
    state.learn(row(), STEPS[3], value, [])
    assert torch.equal(state.apply(guess(value, 5)), value)
    state.learn(row(), STEPS[4], value, [])
    assert torch.allclose(state.apply(guess(2 * value, 6)), value + mean(value), atol=1e-4)


@pytest.mark.parametrize(("grows", "factor"), [(100.0, 2.0), (0.01, 0.5)])
def test_a_trend_that_runs_off_is_bounded(grows, factor):
    state, value = Variance().start(), noise(1) - mean(noise(1))
    for place, size in ((3, 1.0), (4, grows)):
        state.learn(row(), STEPS[place], size * value, [])
    assert torch.allclose(state.apply(guess(value, 7)), factor * value, atol=1e-4)


# rectify --------------------------------------------------------------------------------------------------------------
@given(phi=st.floats(0.1, 1.9), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_a_change_that_is_too_long_or_too_short_is_rectified(phi, seed):
    last, change = noise(seed), noise(seed + 1)
    state = taught(Rectify(), last + change, last + phi * change, last=last)
    again = noise(seed + 2)
    assert torch.allclose(state.apply(guess(last + again, last=last)), last + phi * again, atol=1e-3)


@pytest.mark.parametrize("gain", GAINS)
@given(scale=st.floats(0.5, 2), offset=st.floats(-1, 1), seed=st.integers(0, 999))
@settings(max_examples=20)
def test_a_linear_error_is_taken_off(gain, scale, offset, seed):
    value = noise(seed)
    state = taught(Rectify(gain), value, scale * value + offset, last=value)      # no change was predicted, so that its gain does not matter
    again = noise(seed + 1)
    assert torch.allclose(state.apply(guess(again, last=again)), scale * again + offset, atol=1e-3)


def test_the_published_gain_never_exceeds_one_and_is_one_less_the_error_over_the_change():
    change, zero = noise(1), torch.zeros(LATENT)
    over = [1, 2, 3]
    for phi, wanted in ((0.8, 0.75), (1.0, 1.0), (1.25, 0.8)):
        assert GAINS["as published"](change, phi * change, over).flatten().tolist() == pytest.approx([wanted] * 2, rel=1e-4)
        assert GAINS["least squares"](change, phi * change, over).flatten().tolist() == pytest.approx([phi] * 2, rel=1e-4)
    state = taught(Rectify("as published"), -change, change, last=zero)
    assert torch.allclose(state.apply(guess(change, last=zero)), mean(change), atol=1e-3), "an error larger than the change: it is not followed"


# in the cache ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Skips:
    """Skips the given evaluations."""

    evaluations: tuple
    name = "skips"
    needs_forward = False

    def skip(self, view):
        return view.step.evaluation in self.evaluations


def stepped(correcting, candidates=(HOLD,), skipped=(4, 5), until=8, values=None, rows=None, policy=None, shape=LATENT):
    """A cache run by hand. Gives it and what stood in, by evaluation."""
    clock = Clock([1 - n / 20 for n in range(21)], flow=True)
    cache, out = StepCache(policy or Skips(skipped), candidates, Governor(2.0, 0.0, 9), Report(), correcting), {}
    cache.budget.scale = 1.0        # as if a denoised latent had been weighed
    for n in range(until):
        cache.begin(clock.tick(1 - n / 20))
        for one in rows or (row(shape),):
            if cache.skips() and cache.ready(one):
                out[n] = cache.predict(one)
                cache.ran(1, 0.0)
            else:
                cache.learn(one, values(n).clone())
                cache.ran(1, 1.0)
        cache.finish()
    return cache, out


def growing(n):
    """Every channel grows at a rate of its own, so hold is off by the same gain from step to step."""
    return noise(1) * torch.tensor([1.1, 1.2, 0.9, 1.05]).view(1, 4, 1, 1) ** n


def test_a_skip_is_given_the_corrected_prediction():
    _, plain = stepped(None, values=growing)
    _, corrected = stepped(ChannelAffine().start(), values=growing)
    assert torch.equal(plain[4], growing(3))
    assert torch.allclose(corrected[4], growing(4), rtol=1e-3, atol=1e-3), "one step of hold, as it was measured"
    assert corrected.keys() == plain.keys() == {4, 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=CORRECTIONS)
def test_what_stands_in_has_the_type_of_the_snapshots_and_the_anchor_is_added(correction, dtype):
    cache, _ = stepped(correction().start(), candidates=(HOLD, LINE), values=lambda n: growing(n).to(dtype), until=5)
    anchor = noise(9, dtype=dtype)
    with_anchor, without = cache.predict(row(), anchor), cache.predict(row())
    assert with_anchor.dtype == dtype and torch.allclose(with_anchor.float(), (without.float() + anchor.float()), atol=0.05)
    assert torch.equal(anchor, noise(9, dtype=dtype))


def test_hindcast_scores_what_a_skip_would_have_been_given():
    cache, _ = stepped(ChannelAffine().start(), values=growing, skipped=(), until=6)
    errors = [evaluation.hindcast_error for evaluation in cache.report.each]
    assert errors[1] > 0.02 and max(errors[2:]) < 1e-3, "after one measurement the correction is exact here"


def test_every_competing_predictor_is_measured():
    cache, _ = stepped(ChannelAffine().start(), candidates=(HOLD, LINE), values=growing, skipped=())
    assert set(cache.correcting.tensors) == {(row(), HOLD), (row(), LINE)}


def test_a_second_evaluation_at_the_same_place_measures_nothing():
    state = ChannelAffine().start()
    cache, clock = StepCache(Skips(()), (HOLD,), Governor(2.0, 0.0, 9), Report(), state), Clock([1 - n / 20 for n in range(21)], flow=True)
    for sigma, n in ((1.0, 0), (1.0, 1), (0.95, 2)):
        cache.begin(clock.tick(sigma))
        cache.learn(row(), growing(n))
        cache.finish()
        assert bool(state.tensors) == (n == 2)


@pytest.mark.parametrize("correction", ACTIVE.values(), ids=ACTIVE)
def test_a_correction_is_forgotten_with_the_history_and_counted_in_the_bytes_of_the_run(correction):
    state = correction().start()
    cache, _ = stepped(state, values=growing)
    alone, _ = stepped(None, values=growing)
    assert state.tensors
    cache.forget("a reason")
    assert not state.tensors
    cache.close(), alone.close()
    assert cache.report.cache_bytes == alone.report.cache_bytes + state.peak > alone.report.cache_bytes


def test_dot_products_are_read_back_once_for_all_the_steps_that_they_serve(monkeypatch):
    asked = []
    monkeypatch.setattr(cache_module, "dot_products", lambda past: asked.append(len(past)) or [[1.0] * len(past) for _ in past])
    stepped(None, candidates=(DynamicModes(),), values=growing, skipped=(3, 4, 5), until=7)
    assert asked == [1, 2, 3], "of what was known at evaluations 1, 2 and then 3 to 6"
    asked.clear()
    stepped(None, candidates=(HOLD, LINE), values=growing)
    assert not asked


def test_predictors_get_as_many_snapshots_as_they_use():
    turning = lambda n: torch.stack([torch.cos(0.5 * n + noise(1)), torch.sin(0.5 * n + noise(1))])[0]
    cache, out = stepped(None, candidates=(DynamicModes(),), values=lambda n: turning(torch.tensor(float(n))), skipped=(9, 10), until=12)
    assert len(cache.store.get(row())) == DynamicModes().depth
    assert torch.allclose(out[10], turning(torch.tensor(10.0)), atol=2e-3)
