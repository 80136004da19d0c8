"""Hindcast: every candidate is scored on what it would have said, and the best is chosen."""
import math

import numpy as np
import pytest
import torch

from pack.core.step import Clock
from pack.core.stepcache.hindcast import FEW, LEAST_AGAIN, ROUGH, Hindcast, Known, dot_products, relative_error, sampled, trusted
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.stepcache.predictors.base import distance
from pack.core.stepcache.predictors.divided_differences import DividedDifferences
from pack.core.stepcache.predictors.dmd import DynamicModes
from pack.core.stepcache.predictors.hold import Hold
from pack.core.stepcache.predictors.taylor import Taylor
from pack.core.stepcache.streams import Streams
from pack.core.store import Snapshot
from pack.kernels.drift import SAMPLE

CLOCK = Clock([1 - n / 20 for n in range(21)], flow=True)
STEPS = [CLOCK.tick(1 - n / 20) for n in range(20)]
HOLD, LINE, PARABOLA = Hold(), DividedDifferences(1), DividedDifferences(2)


def path(degree: int, steps=range(20)) -> list[Snapshot]:
    """Snapshots of a random polynomial of the step index."""
    generator = torch.Generator().manual_seed(degree)
    coefficients = [torch.randn(3, 8, generator=generator) for _ in range(degree + 1)]
    return [Snapshot(STEPS[n], sum(c * (n / 5) ** k for k, c in enumerate(coefficients))) for n in steps]


def scored(degree: int, candidates=(HOLD, LINE, PARABOLA), until: int = 5) -> Hindcast:
    hindcast, known = Hindcast(candidates), path(degree)
    for n in range(1, until):
        hindcast.score(known[max(0, n - 3): n], known[n].step, known[n].value)
        hindcast.settle(candidates[0])
    return hindcast


@pytest.mark.parametrize(("degree", "best"), [(1, LINE), (2, PARABOLA)])
def test_the_candidate_that_fits_the_path_is_chosen(degree, best):
    chosen, expected = scored(degree).choose(tuple(STEPS[:5]), STEPS[5])
    assert chosen == best and expected < 1e-4


def fading(steps=range(20)) -> list[Snapshot]:
    """A sum of two exponentials, which no polynomial continues."""
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    return [Snapshot(STEPS[n], a * 0.8 ** n + b * 0.5 ** n) for n in steps]


def test_a_predictor_that_depends_on_the_snapshots_competes_with_their_dot_products():
    modes, known = DynamicModes(), fading()
    hindcast = Hindcast((HOLD, LINE, modes))
    for n in range(4, 8):
        hindcast.score(known[n - 4: n], known[n].step, known[n].value, dot_products(known[n - 4: n]))
        hindcast.settle(modes)
    assert Streams((HOLD, LINE, modes)).needs_gram and not Streams((HOLD, LINE)).needs_gram
    chosen, expected = hindcast.choose(tuple(STEPS[:8]), STEPS[8])
    assert chosen == modes and expected < 1e-3


@pytest.mark.parametrize("candidate", [c for entry in PREDICTORS.values() for c in entry().candidates()], ids=str)
def test_every_candidate_is_scored_on_all_the_snapshots_that_it_uses(candidate):
    known = fading()
    past = known[:candidate.depth]
    hindcast, at = Hindcast((candidate,)), known[candidate.depth]
    hindcast.score(past, at.step, at.value, dot_products(past))
    hindcast.settle(candidate)
    weights = candidate.weights([s.step for s in past], at.step, dot_products(past))
    guess = sum(weight * s.value for weight, s in zip(weights, past, strict=True))
    assert hindcast.last == pytest.approx(relative_error(guess, at.value).item(), rel=1e-3, abs=1e-6)


def test_how_far_a_candidate_reaches_counts_with_all_the_snapshots_that_it_uses():
    hindcast, known = Hindcast((Taylor(3),)), path(3)
    hindcast.score(known[:4], known[4].step, known[4].value + 1)
    hindcast.settle(None)
    one, two = (hindcast.choose(tuple(STEPS[:4]), STEPS[at])[1] * STEPS[at].sigma for at in (4, 5))
    assert two == pytest.approx((distance(STEPS[3:4], STEPS[5]) / distance(STEPS[3:4], STEPS[4])) ** 4 * one), "order 3 has an error of order 4"


def test_a_candidate_is_scored_on_what_a_skip_would_have_put_there_if_that_is_told():
    hindcast, known = Hindcast((HOLD, LINE)), path(1)
    hindcast.score(known[:2], known[2].step, known[2].value, said={HOLD: known[2].value * 1.25})
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.25)
    assert hindcast.choose(tuple(STEPS[:3]), STEPS[3])[0] == LINE, "the others by their own word"


def test_on_noise_hold_is_chosen():
    hindcast, generator = Hindcast((HOLD, LINE, PARABOLA)), torch.Generator().manual_seed(0)
    known = [Snapshot(step, torch.randn(400, generator=generator)) for step in STEPS]
    for n in range(3, 8):
        hindcast.score(known[n - 3: n], known[n].step, known[n].value)
        hindcast.settle(HOLD)
    assert hindcast.choose(tuple(STEPS[:8]), STEPS[8])[0] == HOLD


def test_the_error_is_the_relative_mean_difference_and_is_told_for_the_best():
    hindcast = Hindcast((HOLD,))
    hindcast.score([Snapshot(STEPS[0], torch.tensor([1.0, 3.0]))], STEPS[1], torch.tensor([2.0, 2.0]))
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.5)


def test_the_expected_error_grows_as_the_reach_of_the_candidate():
    hindcast = Hindcast((LINE,))
    hindcast.score([Snapshot(STEPS[n], torch.tensor([v])) for n, v in ((0, 1.0), (1, 2.0))], STEPS[2], torch.tensor([4.0]))
    hindcast.settle(LINE)
    assert hindcast.last == pytest.approx(0.25)
    measured = distance([STEPS[1]], STEPS[2])
    for at in STEPS[3:6]:
        of_the_latent = 0.25 * STEPS[2].sigma * (distance([STEPS[2]], at) / measured) ** 2
        assert hindcast.choose((STEPS[1], STEPS[2]), at)[1] == pytest.approx(of_the_latent / at.sigma)


@pytest.mark.parametrize("flow", [True, False])
def test_of_a_model_that_always_changes_its_mind_by_as_much_the_error_is_expected_as_it_comes(flow):
    """D moves with the square of the share of noise, and an error of D is one of D / sigma in d = (x - D) / sigma."""
    sigmas = [1 - n / 20 for n in range(20)] if flow else [700 * 0.5 ** n for n in range(20)]
    clock, hindcast, held = Clock([*sigmas, 0.0], flow), Hindcast((HOLD,)), torch.full((3,), 100.0)
    steps, way = [clock.tick(sigma) for sigma in sigmas], torch.tensor([1.0, -2.0, 0.5])

    def right(n: int, m: int) -> torch.Tensor:
        """What is computed at n, on the path that what was computed at m leads along."""
        return held + way * (steps[m].noise ** 2 - steps[n].noise ** 2) / steps[n].sigma

    for n in (1, 2, 3):
        hindcast.score([Snapshot(steps[n - 1], held)], steps[n], right(n, n - 1))
        hindcast.settle(HOLD)
    truly = {n: relative_error(held, right(n, 3)).item() for n in range(4, 20)}
    for n, error in truly.items():
        if error < 0.3:
            assert hindcast.choose((steps[3],), steps[n])[1] == pytest.approx(error, rel=0.1)
    assert sorted(truly.values())[9] < 0.3 and max(truly.values()) > 20 * truly[4], "else this proves little"


def test_rates_are_halved_into_the_new_one():
    hindcast = Hindcast((HOLD,))
    for n, (before, now) in enumerate(((1.0, 2.0), (2.0, 2.0)), 1):
        hindcast.score([Snapshot(STEPS[n - 1], torch.tensor([before]))], STEPS[n], torch.tensor([now]))
        hindcast.settle(HOLD)
    expected = 0.25 * distance([STEPS[2]], STEPS[3]) / distance([STEPS[1]], STEPS[2]) * STEPS[2].sigma / STEPS[3].sigma
    before = distance([STEPS[1]], STEPS[2]) / distance([STEPS[0]], STEPS[1]) * STEPS[1].sigma / STEPS[2].sigma
    assert hindcast.choose((STEPS[2],), STEPS[3]) == (HOLD, pytest.approx(expected * before))


def test_of_several_rows_the_worst_counts():
    hindcast = Hindcast((HOLD,))
    for value in (1.0, 1.5, 1.1):
        hindcast.score([Snapshot(STEPS[0], torch.tensor([value]))], STEPS[1], torch.tensor([1.0]))
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.5)


def again(kappa: float, off: float, at=STEPS[1], before=STEPS[0]) -> Hindcast:
    """Heun's two evaluations at a sigma: hold is `off` at the first one, and so much more or less of that at the second."""
    hindcast, one = Hindcast((HOLD,)), torch.ones(3)
    hindcast.score([Snapshot(before, one)], at, one / (1 + off))
    hindcast.settle(HOLD)
    error = kappa * (before.sigma - at.sigma) / (2 * at.sigma) * off
    hindcast.score([Snapshot(at, one * (1 + error))], at, one)
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(error, rel=1e-4)
    return hindcast


@pytest.mark.parametrize("kappa", [0.3, LEAST_AGAIN, 9.0])
def test_a_second_evaluation_at_the_same_place_is_expected_by_how_far_the_first_one_took_it(kappa):
    """It is at another x by half of what the derivative changed by, and what its D makes of that is kappa."""
    hindcast, one = again(kappa, 0.25), torch.ones(3)
    for off, (before, at) in ((0.1, (STEPS[4], STEPS[5])), (0.4, (STEPS[15], STEPS[16]))):
        hindcast.score([Snapshot(before, one)], at, one / (1 + off))
        hindcast.settle(HOLD)
        expected = max(kappa, LEAST_AGAIN) * (before.sigma - at.sigma) / (2 * at.sigma) * off
        assert hindcast.choose((at,), at) == (HOLD, pytest.approx(expected, rel=1e-4))


def test_a_second_evaluation_of_which_nothing_is_known_is_not_skipped_and_teaches_nothing_of_distance():
    hindcast = Hindcast((HOLD,))
    assert hindcast.choose((STEPS[1],), STEPS[1]) == (HOLD, None)
    hindcast.score([Snapshot(STEPS[1], torch.full((3,), 1.25))], STEPS[1], torch.ones(3))
    hindcast.settle(HOLD)
    assert hindcast.last == pytest.approx(0.25)
    assert hindcast.choose((STEPS[1],), STEPS[1]) == hindcast.choose((STEPS[1],), STEPS[2]) == (HOLD, None)
    hindcast = again(3.0, 0.25)
    known = hindcast.known[HOLD]
    hindcast.score([Snapshot(STEPS[1], torch.full((3,), 9.0))], STEPS[1], torch.ones(3))
    hindcast.settle(HOLD)
    assert hindcast.known[HOLD] == known
    hindcast.forget()
    assert hindcast.choose((STEPS[1],), STEPS[1]) == (HOLD, None), "the first evaluation there is gone"


@pytest.mark.parametrize("candidates", [(LINE,), (LINE, PARABOLA)])
def test_without_hold_among_the_candidates_no_second_evaluation_is_skipped(candidates):
    hindcast = Hindcast(candidates)
    for n in range(3, 8):
        hindcast.score(path(2)[n - 3: n], STEPS[n], path(2)[n].value)
        hindcast.settle(LINE)
    assert hindcast.choose(tuple(STEPS[:8]), STEPS[7])[1] is None


def test_an_error_without_end_is_forgotten_at_the_next_one_that_has():
    hindcast = Hindcast((HOLD,))
    for n, value in enumerate((math.inf, 1.5)):
        hindcast.score([Snapshot(STEPS[n], torch.tensor([value]))], STEPS[n + 1], torch.ones(1))
        hindcast.settle(HOLD)
    assert hindcast.known[HOLD].error == pytest.approx(0.5 * STEPS[2].sigma)


def test_a_prediction_that_is_not_a_number_is_infinitely_wrong():
    hindcast = Hindcast((HOLD,))
    hindcast.score([Snapshot(STEPS[0], torch.tensor([math.nan]))], STEPS[1], torch.ones(1))
    hindcast.settle(HOLD)
    assert hindcast.choose((STEPS[1],), STEPS[2])[1] == math.inf


def test_without_history_enough_there_is_no_choice_and_without_scores_no_expectation():
    hindcast = Hindcast((LINE, PARABOLA))
    assert hindcast.choose((STEPS[0],), STEPS[1]) == (None, None)
    assert hindcast.choose((STEPS[0], STEPS[1]), STEPS[2]) == (LINE, None)


def test_a_sample_is_small_and_walks_through_every_channel():
    value = torch.zeros(2, 4096, 256)
    value[..., 7] = 1
    part = sampled(value)
    assert SAMPLE / 2 < part.numel() <= 2 * SAMPLE and part.mean() == pytest.approx(1 / 256, rel=0.1)
    assert torch.equal(sampled(value[0, :3]), value[0, :3].reshape(-1))
    assert FEW / 2 < sampled(value, FEW).numel() <= 2 * FEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_relative_error_is_fp32_whatever_goes_in(dtype):
    error = relative_error(torch.full((70000,), 1.5, dtype=dtype), torch.ones(70000, dtype=dtype))
    assert error.dtype == torch.float32 and error.ndim == 0 and error.item() == pytest.approx(0.5)
    assert torch.isfinite(relative_error(torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)))


# what a group of skips got wrong ---------------------------------------------------------------------------------------
def noisy(seed: int, dtype=torch.float32, shape=(60,)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def missed(groups: dict, past: list[Snapshot], step, actual: torch.Tensor) -> float | None:
    """`groups` tells for each row what stood in where."""
    hindcast = Hindcast((HOLD,))
    hindcast.stood_in = {row: [(STEPS[n], said) for n, said in group.items()] for row, group in groups.items()}
    for row in groups:
        hindcast.measure(row, past, step, actual)
    hindcast.settle(HOLD)
    return hindcast.missed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "variance-exploding"])
@pytest.mark.parametrize("known", [(4,), (3, 4), (1, 4), (0, 2, 4)])
@pytest.mark.parametrize("skips", [1, 2, 3, 4])
def test_what_a_group_missed_is_the_way_between_it_and_the_curve_through_its_ends(skips, known, flow, dtype):
    """Worked out in numpy: the polynomial by least squares through as many points as it has coefficients."""
    sigmas = [12.0 * 0.8 ** n for n in range(20)] if not flow else [1 - n / 20 for n in range(20)]
    clock = Clock([*sigmas, 0.0], flow)
    steps = [clock.tick(sigma) for sigma in sigmas]
    past, end = [Snapshot(steps[n], noisy(n, dtype)) for n in known], 5 + skips
    actual, hindcast = noisy(end, dtype), Hindcast((HOLD,))
    said = {n: noisy(50 + n, dtype) for n in range(5, end)}
    hindcast.stood_in["row"] = [(steps[n], value) for n, value in said.items()]
    hindcast.measure("row", past, steps[end], actual)
    hindcast.settle(HOLD)

    nodes = [*known[-2:], end]
    values = np.stack([noisy(n, dtype).double().numpy().ravel() for n in nodes])
    curve = np.polynomial.polynomial.polyfit(nodes, values, len(nodes) - 1)
    widths = np.abs(np.diff([*sigmas, 0.0])) if flow else -np.diff(np.log(1 + np.array([*sigmas, 0.0])))
    off = sum(widths[n] * (np.polynomial.polynomial.polyval(n, curve) - value.double().numpy().ravel()) for n, value in said.items())
    assert hindcast.missed == pytest.approx(np.linalg.norm(off) / np.linalg.norm(values[-1]), rel=1e-4)


def test_errors_in_one_direction_add_up_and_others_cancel():
    past, zero = [Snapshot(STEPS[n], torch.ones(8)) for n in (0, 1)], torch.ones(8)
    gap = STEPS[0].gap
    assert missed({"row": {2: zero + 0.1, 3: zero + 0.1}}, past, STEPS[4], zero) == pytest.approx(0.2 * gap, rel=1e-4)
    assert missed({"row": {2: zero + 0.1, 3: zero - 0.1}}, past, STEPS[4], zero) == pytest.approx(0.0, abs=1e-6)


def test_of_several_rows_the_one_that_missed_most_counts():
    past, actual = [Snapshot(STEPS[n], noisy(n)) for n in (0, 1)], noisy(4)
    rows = {name: {2: noisy(10 + n), 3: noisy(20 + n)} for n, name in enumerate("abc")}
    alone = [missed({name: group}, past, STEPS[4], actual) for name, group in rows.items()]
    assert len(set(alone)) == 3 and missed(rows, past, STEPS[4], actual) == pytest.approx(max(alone))
    assert missed(dict(reversed(rows.items())), past, STEPS[4], actual) == pytest.approx(max(alone))


@pytest.mark.parametrize("stranger", [noisy(3, shape=(61,)), noisy(3).to("meta")], ids=["shape", "device"])
def test_a_row_of_another_shape_or_device_is_left_out_and_not_taken_for_right(stranger):
    past, actual = [Snapshot(STEPS[n], noisy(n)) for n in (0, 1)], noisy(4)
    assert missed({"row": {2: stranger}}, past, STEPS[4], actual) is None
    assert missed({"row": {2: noisy(2), 3: stranger}}, past, STEPS[4], actual) is None, "half of a group tells nothing"
    beside = {"row": {2: noisy(2)}, "stranger": {2: stranger}}
    assert missed(beside, past, STEPS[4], actual) == missed({"row": {2: noisy(2)}}, past, STEPS[4], actual) > 0


def test_nothing_is_measured_without_a_skip_at_the_same_place_or_after_the_history_was_dropped():
    past, actual = [Snapshot(STEPS[n], noisy(n)) for n in (0, 1)], noisy(4)
    assert missed({"row": {2: noisy(2)}}, past, STEPS[4], actual) is not None, "else this proves nothing"
    assert missed({"row": {}}, past, STEPS[4], actual) is None
    assert missed({"row": {2: noisy(2)}}, past, STEPS[1], actual) is None
    hindcast = Hindcast((HOLD,))
    hindcast.stood_in["row"] = [(STEPS[2], noisy(2))]
    hindcast.forget()
    hindcast.measure("row", past, STEPS[4], actual)
    hindcast.settle(HOLD)
    assert hindcast.missed is None and not hindcast.stood_in


def test_a_group_counts_once_and_ends_for_rows_that_were_not_computed_with_the_others():
    past, hindcast = [Snapshot(STEPS[n], noisy(n)) for n in (0, 1)], Hindcast((HOLD,))
    hindcast.stood_in = {row: [(STEPS[2], noisy(2))] for row in ("here", "away")}
    hindcast.measure("here", past, STEPS[3], noisy(3))
    hindcast.settle(HOLD)
    assert hindcast.missed > 0 and not hindcast.stood_in
    for row in ("here", "away"):
        hindcast.measure(row, past, STEPS[4], noisy(4))
    hindcast.settle(HOLD)
    assert hindcast.missed is None


def test_a_group_that_is_not_a_number_is_infinitely_wrong_and_no_scale():
    past, hindcast = [Snapshot(STEPS[0], noisy(0))], Hindcast((HOLD,))
    hindcast.stood_in["row"] = [(STEPS[1], noisy(1) * math.nan)]
    hindcast.measure("row", past, STEPS[2], noisy(2))
    hindcast.weigh(noisy(3) * math.inf, noisy(4), 0.5)
    assert hindcast.settle(HOLD) is None and hindcast.missed == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_derivative_is_weighed_against_the_denoised_latent(dtype):
    hindcast, x, denoised = Hindcast((HOLD,)), noisy(1, dtype), noisy(2, dtype) * 3
    hindcast.weigh(x, denoised, 0.25)
    a, b = x.double().numpy(), denoised.double().numpy()
    assert hindcast.settle(HOLD) == pytest.approx(np.linalg.norm((a - b) / 0.25) / np.linalg.norm(b), rel=1e-4)
    assert hindcast.settle(HOLD) is None, "once"
    hindcast.weigh(x, denoised * 0, 0.25)
    assert hindcast.settle(HOLD) > 1e6, "finite, and far too much to skip"


def test_scales_and_groups_are_no_candidates():
    past, hindcast = [Snapshot(STEPS[n], noisy(n)) for n in (0, 1)], Hindcast((HOLD,))
    hindcast.stood_in["row"] = [(STEPS[2], noisy(2))]
    hindcast.measure("row", past, STEPS[3], noisy(3))
    hindcast.weigh(noisy(5), noisy(6), 0.5)
    hindcast.score(past, STEPS[3], noisy(3))
    hindcast.settle(HOLD)
    assert set(hindcast.known) == {HOLD} and hindcast.last == pytest.approx(relative_error(noisy(1), noisy(3)).item())
    assert hindcast.choose((STEPS[3],), STEPS[4])[0] == HOLD


# nearer and farther than where an error was measured -------------------------------------------------------------------
def zigzag(n: int) -> Snapshot:
    """A rough path: around 10, up and down by turns and never by the same."""
    return Snapshot(STEPS[n], torch.full((8,), 10.0 + (-1) ** n * (1 + n % 3)))


@pytest.mark.parametrize(("path_of", "nearest"), [(zigzag, (HOLD,)), (lambda n: path(2)[n], (LINE, PARABOLA))], ids=["rough", "smooth"])
def test_where_a_higher_order_did_worse_it_is_not_taken_nearer_by_either(path_of, nearest):
    """Every third step was computed. One step ahead the order says that the parabola's error is 1/27 of what it was at three."""
    hindcast, nodes = Hindcast((HOLD, LINE, PARABOLA)), range(0, 16, 3)
    for n in nodes[1:]:
        hindcast.score([path_of(k) for k in nodes if n - 9 <= k < n], STEPS[n], path_of(n).value)
        hindcast.settle(HOLD)
    chosen, _ = hindcast.choose([STEPS[n] for n in nodes[-3:]], STEPS[16])
    assert chosen in nearest


@pytest.mark.parametrize(("worse", "chosen"), [(1.0, LINE), (1.1, LINE), (1.5, HOLD), (2.0, HOLD)])
def test_a_line_that_was_half_as_bad_again_as_hold_three_steps_ahead_is_not_taken_one_step_ahead(worse, chosen):
    """On a smooth path it would be three times as good there, by its order; but it has just shown that this is none."""
    hindcast, right, off = Hindcast((HOLD, LINE)), torch.full((8,), 10.0), 0.1
    past = [Snapshot(STEPS[n], value) for n, value in ((3, None), (6, right * (1 + off)))]
    line = LINE.weights([STEPS[3], STEPS[6]], STEPS[9])
    past[0] = Snapshot(STEPS[3], (right * (1 + worse * off) - line[1] * past[1].value) / line[0])
    hindcast.score(past, STEPS[9], right)
    hindcast.settle(HOLD)
    assert [hindcast.known[c].error / STEPS[9].sigma for c in (HOLD, LINE)] == pytest.approx([off, worse * off], rel=1e-3)
    assert hindcast.choose((STEPS[6], STEPS[9]), STEPS[10])[0] == chosen


@pytest.mark.parametrize("candidate", [HOLD, LINE, PARABOLA])
def test_an_error_grows_by_its_order_and_shrinks_by_it_as_far_as_it_is_trusted(candidate):
    k = candidate.history
    for trust in (0.0, 0.5, 1.0):
        known = Known(0.3, 3.0 ** k, trust)
        for sigma in (1.0, 0.2, 30.0):
            assert known.at(candidate, 6.0 ** k, sigma) == pytest.approx(0.3 / sigma * 2 ** k)
            assert known.at(candidate, 1.5 ** k, sigma) == pytest.approx(0.3 / sigma * 0.5 ** (1 + trust * (k - 1)))


def test_trust_goes_from_as_good_as_the_plainest_to_rough():
    assert trusted(0.1, 0.2) == trusted(0.2, 0.2) == trusted(0.0, 0.0) == 1.0
    assert trusted(0.2 * (1 + ROUGH) / 2, 0.2) == pytest.approx(0.5)
    assert trusted(0.2 * ROUGH, 0.2) == pytest.approx(0, abs=1e-9) and trusted(9.0, 0.2) == trusted(math.inf, 0.2) == trusted(1.0, 0.0) == 0.0


def test_an_error_that_rises_is_believed_at_once_and_one_that_falls_by_halves():
    hindcast, known = Hindcast((HOLD,)), []
    for n, value in enumerate((1.1, 1.4, 1.2)):
        expected = known[-1] * distance(STEPS[n:n + 1], STEPS[n + 1]) / distance(STEPS[n - 1:n], STEPS[n]) if known else 0.0
        hindcast.score([Snapshot(STEPS[n], torch.tensor([value]))], STEPS[n + 1], torch.ones(1))
        hindcast.settle(HOLD)
        known.append(hindcast.known[HOLD].error)
        now = (value - 1) * STEPS[n + 1].sigma
        assert known[-1] == pytest.approx(max(now, (expected + now) / 2 if n else now))
    assert known[1] > 3 * known[0] and 0.2 * STEPS[3].sigma < known[2] < known[1]
