"""The error budget: what skips come to in the final latent, and when that may not be told."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_by_hand import Path, exploding, far, flow, polynomial, sampled

from pack.core.report import Report
from pack.core.step import Clock, Step
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.error_budget import BOUNDS, BY_GUIDANCE, EXPECTED_TOO_LOW, FALLS, HANDED_ON, LEAST, MOST_GUIDANCE, NOT_LOOKED_BACK, SECOND, ErrorBudget
from pack.core.stepcache.governor import Governor
from pack.core.stepcache.handed_on import BESIDES, against_euler, factors
from pack.core.stepcache.hindcast import Known
from pack.core.stepcache.look_back import LookBack
from pack.core.stepcache.policies import View
from pack.core.stepcache.policies.error_control import ErrorControl
from pack.core.stepcache.predictors.hold import Hold
from pack.core.stepcache.solvers import SOLVERS
from pack.core.store import Row

SIGMAS = flow(20)
ROW = Row("cpu", 0, None, 0, None, (1, 4))


def steps_of(sigmas, is_flow=True) -> list[Step]:
    clock = Clock(sigmas, is_flow)
    return [clock.tick(sigma) for sigma in sigmas[:-1]]


STEPS = steps_of(SIGMAS)


def budget(scale: float | None = 1.5, **more) -> ErrorBudget:
    made = ErrorBudget(**more)
    made.scale = scale
    return made


# what a skip comes to --------------------------------------------------------------------------------------------------
@given(st.floats(0, 1), st.floats(0.01, 9), st.floats(0.1, 9), st.integers(0, 19), st.booleans(), st.floats(1, 9))
def test_a_skip_comes_to_what_the_equation_says(error, scale, ratio, n, looks_back, guidance):
    made, step = budget(scale, guidance=guidance, looks_back=looks_back), STEPS[n]
    made.ratio = ratio
    late = NOT_LOOKED_BACK if n >= 18 or not looks_back else 1.0
    amplified = late * max(made.handed_on * step.noise ** made.falls, LEAST)
    assert made.share(step, error) == pytest.approx(amplified * ratio * (SIGMAS[n] - SIGMAS[n + 1]) * error * scale)


@given(st.floats(1, MOST_GUIDANCE), st.floats(1, MOST_GUIDANCE), st.integers(0, 19))
def test_more_guidance_and_not_looking_back_hand_more_of_an_error_on(one, other, n):
    low, high = sorted((one, other))
    assert ErrorBudget(high).handed_on >= ErrorBudget(low).handed_on and ErrorBudget(high).falls >= ErrorBudget(low).falls
    without, looking_back = (ErrorBudget(low, looks_back=looks_back).gain(STEPS[n]) for looks_back in (False, True))
    assert without == pytest.approx(looking_back * (1.0 if n >= 18 else NOT_LOOKED_BACK)), "after the last skip there is no time to make up for it"


def test_where_the_last_step_has_nothing_left_to_do_the_one_before_it_has_no_time_to_make_up_for_anything():
    sigmas = [*SIGMAS[:-1], 4e-5, 0.0]
    made = ErrorBudget(looks_back=True, clock=Clock(sigmas, True))
    gains = [made.gain(step) for step in steps_of(sigmas)]
    plain = [ErrorBudget(looks_back=True).gain(step) for step in steps_of(SIGMAS)]
    assert gains[17] == pytest.approx(plain[17]) and gains[18] == pytest.approx(plain[18]) and plain[18] > plain[17]


RISING = [*SIGMAS[:8], *SIGMAS[5:]]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "unipc"])
@pytest.mark.parametrize("error", [0.0, 1e-9, 0.1, math.inf])
def test_before_a_rise_of_sigma_no_error_is_within_any_tolerance_and_after_it_all_is_as_without(error, sampler):
    made, policy = budget(sampler=sampler, clock=Clock(RISING, True)), ErrorControl(1.0)
    plain, steps = budget(), steps_of(RISING)
    for n, step in enumerate(steps[:-1]):
        share = made.share(step, error)
        if n < 8:
            assert not policy.skip(View(step, (steps[0],), share, 0.0))
        else:
            assert share == plain.share(step, error) and policy.skip(View(step, (steps[0],), share, 0.0)) == (share <= math.sqrt(2 / 20))


@pytest.mark.parametrize("error", [0.0, 0.1, None])
@pytest.mark.parametrize("end", [lambda made: made.settle(0.1), lambda made: made.settle(None), lambda made: made.drop()])
def test_of_a_skip_before_a_rise_of_sigma_which_another_policy_may_make_no_error_is_told(end, error):
    steps = steps_of(RISING)
    made = budget()
    made.skip(steps[5], error)
    end(made)
    made.skip(steps[12], 0.1)
    made.settle(0.1 * steps[12].gap)
    assert made.total is None


def test_below_zero_there_is_no_noise_and_a_number_comes_out():
    sigmas = [1.0, 0.6, 0.3, -0.1, -0.3]
    for guidance in (1.0, 2.5):
        made = budget(guidance=guidance, sampler="dpmpp_2m", clock=Clock(sigmas, True))
        assert all(isinstance(made.share(step, 0.1), float) for step in steps_of(sigmas))


@given(st.integers(3, 17), st.floats(0.001, 0.2))
def test_evaluations_of_which_there_are_two_per_step_share_the_tolerance(n, tolerance):
    policy = ErrorControl(tolerance)
    once, twice = STEPS[n], replace(STEPS[n], evaluation=2 * n)
    for predicted in (tolerance * math.sqrt(2 / 20) * factor for factor in (0.6, 0.8, 1.1)):
        seen = [policy.skip(View(step, (STEPS[0],), predicted, 0.0)) for step in (once, twice)]
        assert seen == [predicted <= tolerance * math.sqrt(2 / 20), predicted <= tolerance * math.sqrt(2 / 40)]


def test_with_little_noise_left_an_error_stays_in_the_picture():
    steps = steps_of([14 * 0.6 ** n for n in range(25)] + [0.0], is_flow=False)
    gains = [ErrorBudget(looks_back=True).gain(step) for step in steps[:-2]]
    assert gains == sorted(gains, reverse=True) and gains[-1] == gains[-5] == LEAST < gains[0]


def test_the_evaluations_of_a_step_share_what_the_step_moves():
    """Heun's two are worth half a step each."""
    made, once, twice = budget(), STEPS[8], replace(STEPS[8], evaluation=16)
    assert once.often == 1 and twice.often == 2
    assert made.share(twice, 0.1) == pytest.approx(made.share(once, 0.1) / 2)
    for step, share in ((once, 1.0), (twice, 0.5)):
        made = budget()
        made.skip(step, 0.1)
        made.settle(0.1 * step.gap)
        assert made.total == pytest.approx(made.gain(step) * step.gap * 0.1 * 1.5 * share)


@pytest.mark.parametrize("ratio", [EXPECTED_TOO_LOW, 0.4])
def test_one_step_computed_by_itself_settles_little_and_ten_settle_all(ratio):
    """Errors one step ahead are no proof of how a group of skips turns out."""
    made, doubts = budget(), []
    made.ratio = ratio
    for _ in range(10):
        made.settle(None)
        doubts.append((made.ratio - 1) / (ratio - 1))
    assert 0.5 < doubts[0] < 0.9 and 0.25 < doubts[1] < 0.8 and doubts[9] < 0.1


# other samplers than Euler ---------------------------------------------------------------------------------------------
def carried(solver, sigmas, n: int, falls: float) -> float:
    """What one wrong D_n comes to at the end, by sampling with it: a model whose dD/dx hands errors on as Euler's steps would have it."""
    noise = sigmas[:-1]
    kappa = [0.0, *((((noise[k - 1] / noise[k]) ** falls - sigmas[k + 1] / sigmas[k]) / (1 - sigmas[k + 1] / sigmas[k])) for k in range(1, len(noise)))]
    ends = []
    for off in (0.0, 1.0):
        *_, end = sampled(solver, sigmas, torch.zeros(1, dtype=torch.float64), lambda k, x, off=off: kappa[k] * x + off * (k == n))
        ends.append(end.item())
    return abs(ends[1] - ends[0])


@pytest.mark.parametrize("falls", [1.0, 1.25])
@pytest.mark.parametrize("sigmas", [SIGMAS, flow(50), [0.9 * (1 - n / 12) for n in range(13)]], ids=["20", "50", "even"])
def test_a_sampler_of_several_steps_hands_an_error_on_as_sampling_with_it_shows(sigmas, falls):
    factors = against_euler(SOLVERS["dpmpp_2m"], Clock(sigmas, True), falls)
    shown = [carried(SOLVERS["dpmpp_2m"], sigmas, n, falls) / carried(SOLVERS["euler"], sigmas, n, falls) for n in range(1, len(sigmas) - 1)]
    assert factors[1:] == pytest.approx([max(factor, 1.0) for factor in shown], rel=1e-3)
    assert max(factors) > 1.5 and against_euler(SOLVERS["euler"], Clock(sigmas, True), falls) == pytest.approx([1.0] * len(factors))


def test_the_last_skip_of_a_sampler_of_several_steps_is_dearest():
    """Nothing takes back what it went too far."""
    factors = against_euler(SOLVERS["dpmpp_2m"], Clock(SIGMAS, True), 1.0)
    assert factors[-2] == max(factors) > 1.3 * factors[10]
    plain, known = ErrorBudget(looks_back=True), ErrorBudget(looks_back=True, sampler="dpmpp_2m", clock=Clock(SIGMAS, True))
    assert [known.gain(step) / plain.gain(step) for step in STEPS] == pytest.approx(factors)


@pytest.mark.parametrize("tiny", [1e-2, 1e-4, 1e-6])
def test_a_step_of_next_to_nothing_before_a_long_one_does_not_take_the_whole_tolerance(tiny):
    """By the letter dpmpp_2m goes without bound too far there, and one skip beside it would never be allowed."""
    sigmas = [*SIGMAS[:9], SIGMAS[8] * (1 - tiny), *SIGMAS[12:]]
    found = against_euler(SOLVERS["dpmpp_2m"], Clock(sigmas, True), 1.0)
    assert 3 < max(found) <= 5 and min(found) >= 1


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.5, 0.2, 0.0], [0.5, 1.0, 0.4, 0.0], [1.0, 0.0], [1.0, 0.5, math.nan, 0.0]])
def test_a_schedule_that_no_solver_is_made_for_counts_as_eulers(sigmas):
    for is_flow in (True, False):
        assert against_euler(SOLVERS["dpmpp_2m"], Clock(sigmas, is_flow), 1.0) == (1.0,) * (len(sigmas) - 1)


def test_a_sampler_that_nobody_knows_is_taken_for_the_one_that_hands_more_on():
    clock = Clock(SIGMAS, True)
    assert factors("euler", clock, 1.0) == factors("heun", clock, 1.0) == against_euler(SOLVERS["euler"], clock, 1.0)
    assert factors("deis", clock, 1.0) == factors("of tomorrow", clock, 1.0) == against_euler(SOLVERS["dpmpp_2m"], clock, 1.0)
    for sampler, times in BESIDES.items():
        assert factors(sampler, clock, 1.0) == factors("dpmpp_2m", clock, 1.0)
        assert factors(sampler, clock, 1.0, 1.0) == pytest.approx([times * factor for factor in factors("dpmpp_2m", clock, 1.0)]) and times > 1


def test_guidance_counts_from_one_to_the_most_that_was_measured():
    by = {guidance: ErrorBudget(guidance, looks_back=True) for guidance in (0.0, 1.0, 2.0, MOST_GUIDANCE, 30.0)}
    assert (by[1.0].handed_on, by[1.0].falls) == (by[0.0].handed_on, by[0.0].falls) == (HANDED_ON, FALLS)
    assert by[2.0].handed_on == pytest.approx(HANDED_ON + BY_GUIDANCE[0]) and by[2.0].falls == pytest.approx(FALLS + BY_GUIDANCE[1])
    assert (by[30.0].handed_on, by[30.0].falls) == (by[MOST_GUIDANCE].handed_on, by[MOST_GUIDANCE].falls)


@given(st.integers(0, 18), st.floats(0.05, 1))
def test_one_unit_is_the_relative_error_of_the_final_latent(n, error):
    """With K = 2, r = 1/2, q = 0 and a model that hands an error on as it is, the estimate is the error; K counts the missing look back twice."""
    path = Path(SOLVERS["euler"], SIGMAS, polynomial(2), kappa=1.0)
    made, clean = budget(), path.x[n] - SIGMAS[n] * path.d[n]
    made.handed_on, made.falls, made.ratio = 1.0, 0.0, 1 / NOT_LOOKED_BACK
    made.scale = (path.d[n].norm() / clean.norm()).item()
    made.skip(STEPS[n], error)
    wrong = list(sampled(path.solver, SIGMAS, path.start, lambda k, x: path.denoised(k, x) - SIGMAS[n] * error * path.d[n] * (k == n)))
    assert made.total == pytest.approx(far(wrong[-1], path.x[-1]) * (path.x[-1].norm() / clean.norm()).item())


@given(st.integers(3, 390), st.floats(0.01, 1))
def test_the_same_error_of_the_same_model_counts_alike_in_both_parameterisations(n, off):
    """A denoised latent that is off by `off` |D|, in steps so small that both schedules cover the same way."""
    wide = exploding(400)
    narrow = [sigma / (1 + sigma) for sigma in wide]
    shares = []
    for sigmas, is_flow in ((wide, False), (narrow, True)):
        made, d = budget(), 1.7     # |d|, which cancels
        made.scale = d
        shares.append(made.share(steps_of(sigmas, is_flow)[n], off / sigmas[n] / d))
    assert shares[0] == pytest.approx(shares[1], rel=0.03)


# the run ---------------------------------------------------------------------------------------------------------------
def skipped(made: ErrorBudget, errors: dict[int, float | None], missed: float | None = None) -> float:
    """A group of skips and the computed step that ends it; gives what was owed before that."""
    for n, error in errors.items():
        made.skip(STEPS[n], error)
    owed = made.owed
    made.settle(missed)
    assert made.owed == 0.0
    return owed


def test_errors_add_up_within_a_group_and_in_squares_over_groups():
    made = budget()
    shares = [made.share(STEPS[n], 0.1) for n in (3, 4, 8)]
    groups = [skipped(made, {3: 0.1, 4: 0.1}), skipped(made, {8: 0.1})]
    assert groups == pytest.approx([shares[0] + shares[1], shares[2]])
    assert made.total == pytest.approx(math.hypot(*groups))
    made.skip(STEPS[12], 0.1)
    assert made.total == pytest.approx(math.hypot(*groups, made.share(STEPS[12], 0.1))), "the group under way counts"


@given(st.lists(st.floats(BOUNDS[0], BOUNDS[1]), min_size=1, max_size=6))
def test_what_groups_turned_out_to_be_counts_and_is_followed(found):
    made, ratio, squares = budget(), EXPECTED_TOO_LOW, 0.0
    for factor in found:
        way = STEPS[5].gap * 0.1 + STEPS[6].gap * 0.2
        owed = skipped(made, {5: 0.1, 6: 0.2}, factor * way)
        squares += (owed / ratio * factor) ** 2
        ratio = (ratio + factor) / 2
        assert made.ratio == pytest.approx(ratio) and made.total == pytest.approx(math.sqrt(squares))
    assert made.share(STEPS[9], 0.1) == pytest.approx(budget().share(STEPS[9], 0.1) * ratio / EXPECTED_TOO_LOW)


@pytest.mark.parametrize(("factor", "bound"), [(0.0, BOUNDS[0]), (1e6, BOUNDS[1])])
def test_one_odd_group_does_not_decide_over_the_rest(factor, bound):
    made = budget()
    owed = skipped(made, {5: 0.1}, factor * STEPS[5].gap * 0.1)
    assert made.ratio == pytest.approx((EXPECTED_TOO_LOW + bound) / 2) and made.total == pytest.approx(owed / EXPECTED_TOO_LOW * bound)


@pytest.mark.parametrize("missed", [None, math.inf, math.nan])
def test_a_group_that_was_not_measured_counts_as_expected_and_teaches_nothing(missed):
    made = budget()
    owed = skipped(made, {5: 0.1, 6: 0.1}, missed)
    assert made.ratio == EXPECTED_TOO_LOW and made.total == pytest.approx(owed) and owed > 0


def test_a_computed_step_without_skips_before_it_costs_nothing():
    made = budget()
    made.settle(None)
    made.settle(0.3)
    assert made.total == 0.0


@pytest.mark.parametrize("ratio", [0.3, EXPECTED_TOO_LOW, 8.0])
def test_while_every_step_is_computed_errors_come_to_be_taken_as_they_are_expected(ratio):
    made = budget()
    made.ratio = ratio
    distances = []
    for _ in range(20):
        distances.append(abs(made.ratio - 1))
        made.settle(None)
    assert distances == sorted(distances, reverse=True) and distances[1] < distances[0] and made.ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("error", [None, math.inf])
def test_a_group_of_which_nothing_was_expected_counts_by_what_it_turned_out_to_be(error):
    """As when a policy skips before any predictor was scored."""
    told, untold, way = budget(), budget(), STEPS[5].gap + STEPS[6].gap
    told.ratio = 1.0
    skipped(told, {5: 0.1, 6: 0.1}, 0.1 * way)
    skipped(untold, {5: error, 6: error}, 0.1 * way)
    assert untold.total == pytest.approx(told.total) and untold.total > 0 and untold.ratio == EXPECTED_TOO_LOW


@pytest.mark.parametrize("error", [None, math.inf, math.nan])
def test_an_error_that_was_neither_expected_nor_measured_cannot_be_told(error):
    made = budget()
    made.skip(STEPS[5], error)
    assert made.total is None
    made.settle(None)
    assert made.total is None and skipped(made, {8: 0.1}, 0.1 * STEPS[8].gap) and made.total is None, "nor can the sum"


def test_a_skip_that_nothing_can_measure_counts_as_it_was_expected_beside_what_was_measured():
    """Heun's second evaluation at a sigma: a later step that closes a bracket says nothing of it."""
    made, other = budget(), budget()
    made.skip(STEPS[5], 0.1)
    made.skip(STEPS[6], 0.2, second=True)
    other.skip(STEPS[5], 0.1)
    beside = made.share(STEPS[6], 0.2, second=True)
    assert made.owed == pytest.approx(made.share(STEPS[5], 0.1) + beside) and beside == pytest.approx(SECOND * made.share(STEPS[6], 0.2))
    for one in (made, other):
        one.settle(STEPS[5].gap * 0.1)
    assert made.total == pytest.approx(other.total + beside) and made.ratio == other.ratio
    alone = budget()
    alone.skip(STEPS[6], 0.2, second=True)
    alone.settle(0.0)
    assert alone.total == pytest.approx(beside) and alone.ratio == EXPECTED_TOO_LOW


def test_where_the_history_is_dropped_the_group_counts_as_expected_and_nothing_is_learnt():
    made = budget()
    made.drop()
    assert made.ratio == EXPECTED_TOO_LOW and made.total == 0.0, "no step was computed"
    made.skip(STEPS[5], 0.1)
    made.drop()
    assert made.total == pytest.approx(made.share(STEPS[5], 0.1)) and made.ratio == EXPECTED_TOO_LOW and made.owed == 0


def test_where_the_scale_is_unknown_no_error_can_be_told():
    made = budget(scale=None)
    assert made.share(STEPS[5], 0.1) is None and budget().share(STEPS[5], None) is None
    skipped(made, {5: 0.1}, 0.1)
    assert made.total is None
    assert ErrorBudget().total == 0.0, "without a skip it is known"


# in a run --------------------------------------------------------------------------------------------------------------
class Bench:
    """A cache stepped by hand at guided output; `values` are the derivatives that would be computed."""

    def __init__(self, policy, values, look_back: LookBack | None = None, weighed=True):
        self.cache, self.values, self.weighed = StepCache(policy, (Hold(),), Governor(2.0, 0.0, 4), Report(), look_back=look_back), values, weighed
        self.clock = Clock(SIGMAS, True)

    def run(self) -> Report:
        for sigma, value in zip(SIGMAS, self.values, strict=False):
            cache = self.cache
            cache.begin(self.clock.tick(sigma))
            if skips := cache.skips() and cache.ready(ROW):
                cache.predict(ROW)
            else:
                cache.learn(ROW, value)
            cache.ran(1, 0.0 if skips else 1.0)
            if self.weighed:
                cache.weigh(torch.full((1, 4), 4.0 + 2.0 * sigma), torch.full((1, 4), 4.0))     # |d| / |D| = 0.5
            cache.finish()
        cache.close()
        return cache.report


def smooth(n: int) -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, -1.0, 0.5]]) * (1 + n / 100)


VALUES = [smooth(n) for n in range(20)]


def computed(report: Report) -> list[bool]:
    return [e.computed for e in report.each]


def test_error_control_computes_everything_where_errors_cannot_be_told():
    policy = ErrorControl(tolerance=0.3)
    assert computed(Bench(policy, VALUES).run()).count(False) > 5, "else this proves nothing"
    blind = Bench(policy, VALUES, weighed=False).run()
    assert all(computed(blind)) and blind.estimated_error is None


def test_the_report_tells_the_error_of_a_run_that_skipped_and_of_no_other():
    assert Bench(ErrorControl(tolerance=0.0), VALUES).run().estimated_error is None
    report = Bench(ErrorControl(tolerance=0.3), VALUES).run()
    assert 0 < report.estimated_error < 0.3 and "estimated error" in report.line()


class Second:
    """Skips what is evaluated for the second time at a sigma."""

    name, needs_forward = "second", False

    def skip(self, view):
        return view.computed[-1].place == view.step.place


def test_a_second_evaluation_that_was_skipped_is_not_measured_by_the_next_step():
    bench = Bench(Second(), VALUES)
    cache, beside = bench.cache, []
    for sigma, value in zip(SIGMAS[:8], VALUES, strict=False):
        for again in (False, True):
            cache.begin(bench.clock.tick(sigma))
            if cache.skips():
                cache.predict(ROW)
            else:
                cache.learn(ROW, value)
            assert cache.skips() == again
            cache.ran(1, 0.0 if again else 1.0)
            cache.weigh(torch.full((1, 4), 4.0 + 2.0 * sigma), torch.full((1, 4), 4.0))
            cache.finish()
        beside.append(cache.budget.beside)
        assert not cache.streams.of("").stood_in and cache.budget.due == 0 and cache.streams.missed is None
    assert all(beside[2:]) and cache.budget.spent > 0


class Every:
    """Every third step is computed, from the first on."""

    name, needs_forward = "every third", False

    def skip(self, view):
        return view.step.index % 3 != 0


def test_skips_before_anything_was_scored_are_in_the_estimate():
    """Nothing is known when steps 1 and 2 are skipped; step 3 then tells how far off they were."""
    report = Bench(Every(), [VALUES[0], VALUES[0], VALUES[0], VALUES[0] * 1.5]).run()
    assert computed(report) == [True, False, False, True] and report.each[1].predicted_error is None
    gaps = [STEPS[n].gap for n in (1, 2)]
    missed = (gaps[0] / 6 + gaps[1] / 3) / 1.5      # from 1 to 1.5 in three steps, and 1 stood in
    handed_on = sum(HANDED_ON * NOT_LOOKED_BACK * STEPS[n].noise ** FALLS * STEPS[n].gap for n in (1, 2)) / sum(gaps)
    assert report.estimated_error == pytest.approx(handed_on * missed * 0.5, rel=1e-4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_output_that_is_not_a_number_leaves_an_error_that_cannot_be_told(wrong):
    values = [*VALUES[:3], VALUES[3] * wrong, *VALUES[4:]]
    report = Bench(Every(), values).run()
    assert report.estimated_error is None and "estimated error" not in report.line() and not all(computed(report))


def test_from_where_it_no_longer_looks_back_more_of_an_error_is_expected_to_stay():
    cache = Bench(Every(), VALUES, LookBack(SOLVERS["euler"], SIGMAS)).cache
    before = cache.budget.gain(STEPS[8])
    for _ in range(2):
        cache.look_back_no_more()
        assert cache.budget.gain(STEPS[8]) == before * NOT_LOOKED_BACK and cache.look_back is None
    without = Bench(Every(), VALUES).cache
    without.look_back_no_more()
    assert without.budget.gain(STEPS[8]) == before * NOT_LOOKED_BACK


@pytest.mark.parametrize(("guidance", "groups"), [(1.0, [8, 8]), (2.0, [2, 3, 4, 5])])
def test_with_guidance_no_group_is_longer_by_two_than_the_longest_that_was_measured(guidance, groups):
    bench = Bench(ErrorControl(tolerance=1.0), [torch.ones(1, 4)] * 20)
    bench.cache.budget, bench.cache.governor = ErrorBudget(guidance), Governor(2.0, 0.0, 8)
    decisions = "".join("." if one else "s" for one in computed(bench.run()))
    assert [len(group) for group in decisions.strip(".").split(".")] == groups


@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 18), st.floats(0, 0.2))
def test_at_no_decision_does_a_larger_tolerance_skip_less(one, other, n, error):
    low, high = sorted((one, other))
    bench = Bench(ErrorControl(low), VALUES)
    cache = bench.cache
    for sigma in SIGMAS[:2]:
        cache.begin(bench.clock.tick(sigma))
        cache.learn(ROW, VALUES[0])
        cache.ran(1, 1.0)
        cache.weigh(torch.zeros(1, 4) + 2, torch.ones(1, 4))
        cache.finish()
    cache.streams.of("").known = {Hold(): Known(error, n - 1.0, 1.0)}
    decisions = []
    for tolerance in (0.0, low, high):
        cache.policy = ErrorControl(tolerance)
        cache.begin(replace(STEPS[n], evaluation=2))
        decisions.append(cache.skips())
    assert decisions == sorted(decisions) and not decisions[0]
