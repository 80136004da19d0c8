"""The step cache of one run and the run that owns it, without a host: rows, decisions, and what is ready."""
from dataclasses import dataclass, field

import pytest
import torch

from pack.core.families import FAMILIES
from pack.core.report import Report
from pack.core.run import Run, Settings
from pack.core.step import Clock
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.governor import Governor
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.predictors.divided_differences import DividedDifferences
from pack.core.stepcache.predictors.hold import Hold
from pack.core.store import Row

SIGMAS = [1 - n / 20 for n in range(21)]
ROW = Row("cpu", 0, "uuid", 0, None, (1, 4))
OTHER = ROW._replace(cond=1)


@dataclass(frozen=True)
class Always:
    name = "always"
    signal: str = ""
    asked: list = field(default_factory=list, compare=False)

    @property
    def needs_forward(self):
        return self.signal == "first block"

    def skip(self, view):
        self.asked.append(view.signal.drift)
        return view.signal.drift is None or view.signal.drift < 0.5


@dataclass
class Bench:
    """A cache that is stepped by hand. `rows` are what a level would compute, with the step's number as value."""

    cache: StepCache
    clock: Clock = field(default_factory=lambda: Clock(SIGMAS, True))
    n: int = 0

    def step(self, *rows, signals=()) -> bool:
        self.cache.begin(self.clock.tick(SIGMAS[self.n]))
        answers = [self.cache.skips(signal) for signal in signals or (None,)]
        assert len(set(answers)) == 1, "one decision for all rows"
        for row in rows:
            ready = answers[0] and self.cache.ready(row)
            if not ready:
                self.cache.learn(row, torch.full((1, 4), float(self.n)))
            self.cache.ran(1, 0.0 if ready else 1.0)
        self.cache.finish()
        self.n += 1
        return answers[0]


HOLD = (Hold(),)


def bench(policy=None, candidates=HOLD, skips=4) -> Bench:
    return Bench(StepCache(policy or Always(), candidates, Governor(2.0, 0.0, skips), Report()))


def test_a_row_without_a_history_is_computed_where_the_others_are_skipped():
    b = bench()
    b.step(ROW)
    assert b.step(ROW, OTHER)
    assert [e.share for e in b.cache.report.each] == [1.0, 0.5] and [e.computed for e in b.cache.report.each] == [True, False]


def test_a_row_that_missed_the_last_computed_step_is_not_ready():
    b = bench(skips=1)
    b.step(ROW, OTHER)
    b.step(ROW, OTHER)
    b.step(ROW)                 # computed, and OTHER is not there
    b.cache.begin(b.clock.tick(SIGMAS[b.n]))
    assert b.cache.skips() and b.cache.ready(ROW) and not b.cache.ready(OTHER)


def test_a_row_whose_tokens_are_more_or_fewer_now_is_not_ready():
    b = bench()
    b.step(ROW)
    assert b.cache.ready(ROW) and b.cache.ready(ROW, (1, 4)) and not b.cache.ready(ROW, (1, 6))


def test_a_row_with_a_short_history_is_predicted_from_what_it_has():
    b = bench(candidates=(Hold(), DividedDifferences(1), DividedDifferences(2)), skips=1)
    for _ in range(4):
        b.step(ROW)             # computed, skipped, computed, skipped
    b.step(ROW, OTHER)          # OTHER appears
    b.cache.begin(b.clock.tick(SIGMAS[b.n]))
    assert b.cache.skips()
    assert torch.equal(b.cache.predict(OTHER), torch.full((1, 4), 4.0))
    assert torch.allclose(b.cache.predict(ROW), torch.full((1, 4), 5.0)), "values are the step's number, a line"


def test_a_gate_decides_on_the_row_that_runs_first_and_the_others_obey():
    policy = Always("first block")
    b = bench(policy)
    near, far = torch.ones(3), torch.full((3,), 5.0)
    assert not b.step(ROW, signals=(near, far)), "first step"
    assert b.step(ROW, signals=(near * 1.1, far)) and not b.step(ROW, signals=(far, near))
    assert policy.asked == [pytest.approx(0.1), pytest.approx(4.0)]
    assert b.step(ROW, signals=(far,)), "measured from the last computed step"


def test_a_gate_keeps_its_own_copy_of_a_signal():
    b, signal = bench(Always("first block")), torch.ones(3)
    b.step(ROW, signals=(signal,))
    signal.fill_(100.0)
    assert b.step(ROW, signals=(torch.ones(3),))


def test_an_evaluation_that_broke_off_leaves_no_half_of_it_in_the_next():
    b = bench()
    b.step(ROW)
    b.cache.begin(b.clock.tick(SIGMAS[1]))
    b.cache.ran(3, 0.25)
    b.n = 2
    b.step(ROW)
    assert [e.share for e in b.cache.report.each] == [1.0, 0.0]


def test_giving_up_computes_everything_from_then_on_and_says_why():
    b = bench()
    b.step(ROW)
    assert b.step(ROW)
    b.cache.give_up("a reason")
    b.cache.give_up("another")
    assert not b.step(ROW) and b.cache.report.reason == "a reason" == b.cache.report.each[-1].why


def test_a_closed_cache_holds_no_tensor_and_knows_its_peak():
    b = bench(Always("first block"), candidates=(DividedDifferences(1),))
    b.step(ROW, OTHER, signals=(torch.ones(3),))
    b.step(ROW, OTHER, signals=(torch.ones(3),))
    b.cache.begin(b.clock.tick(SIGMAS[b.n]))
    b.cache.skips(torch.ones(3))        # and here the run breaks off
    b.cache.close()
    assert b.cache.report.cache_bytes == 4 * 4 * 4 + 3 * 3 * 4 and b.cache.store.bytes == 0
    watch = b.cache.watch
    assert watch.before is watch.now is watch.output is None and not watch.computed and not watch.moves and not watch.known
    assert not b.cache.streams.of("").waiting


def run(**more) -> Run:
    settings = Settings(Always(), DividedDifferences(**more.pop("predictor", {})), LEVELS["model output"]())
    return Run(settings, next(iter(FAMILIES.values())), SIGMAS, True, more.get("sampler", "euler"), 2.0, 0.0)


def test_passes_are_counted_within_a_context_window_and_anew_in_every_evaluation():
    ordinals, now = [], run()
    for sigma in SIGMAS[:2]:
        now.begin(sigma)
        for window in (None, None, (0, 1), (2, 3), (0, 1)):
            now.batch(window)
            ordinals.append(now.ordinal)
        now.finish()
    assert ordinals == [0, 1, 0, 0, 1] * 2


def test_rows_tell_conditions_apart_in_the_order_of_the_batch():
    now = run()
    now.begin(SIGMAS[0])
    now.batch((0, 1))
    patches = frozenset({("dit", ("double_block", 1))})
    assert now.rows("cpu", ["a", "a"], [1, 0], (0, 1), (2, 4), patches) == (
        Row("cpu", 0, "a", 1, (0, 1), (2, 4), patches), Row("cpu", 0, "a", 0, (0, 1), (2, 4), patches))


def test_a_call_from_outside_an_evaluation_belongs_to_no_pass():
    now = run()
    now.batch(None)
    assert now.ordinal is None
    now.begin(SIGMAS[0])
    now.batch(None)
    now.finish()
    assert now.ordinal is None
    now.batch(None)
    assert now.ordinal is None


def test_where_conditions_change_the_history_begins_anew_and_says_why():
    now = run()
    for n, acting in enumerate([(True,), (True,), (False,)]):
        now.begin(SIGMAS[n], acting)
        now.cache.ran(1, 1.0)
        now.finish()
    assert [e.why for e in now.report.each] == ["first step", "", "conditions start or end"]


def test_where_sigma_rises_the_history_begins_anew_and_says_why():
    now = run()
    for sigma in (SIGMAS[0], SIGMAS[3], SIGMAS[1]):
        now.begin(sigma)
        now.cache.ran(1, 1.0)
        now.finish()
    assert now.report.each[-1].why == "sigma rises" and now.report.each[-1].computed


def test_samplers_that_add_noise_get_short_skips():
    assert run().cache.governor.max_skips == 4 and run(sampler="euler_ancestral").cache.governor.max_skips == 1
    assert "noise" in run(sampler="euler_ancestral").report.reason and run().report.reason == ""
