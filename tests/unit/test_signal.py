"""What a policy watches, against the same numbers worked out another way from everything that was ever shown."""
import random

import pytest
import torch

from pack.core.step import Clock
from pack.core.stepcache.signal import FIRST_BLOCK, MODEL_INPUT, MODULATED_INPUT, NOTHING, OUTPUT, Watch
from pack.core.store import Row
from pack.kernels.drift import SAMPLE

SIGMAS = [1 - n / 30 for n in range(31)]
ROW = Row("cpu", 0, "uuid", 0, None, (1, 6))
OTHER = ROW._replace(cond=1)


def steps(count=30):
    clock = Clock(SIGMAS, flow=True)
    return [clock.tick(SIGMAS[n]) for n in range(count)]


def shown(seed: int, count=30, dtype=torch.float32):
    """Smooth and noisy tensors, one per evaluation."""
    make = torch.Generator().manual_seed(seed)
    base, slope, bend = torch.randn((3, 50), generator=make)
    return [(base + n / 10 * slope + n * n / 200 * bend + 0.05 * torch.randn(50, generator=make)).to(dtype) for n in range(count)]


def mean(a) -> float:
    return a.float().abs().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_what_its_definition_gives_over_a_run_with_random_skips(seed, dtype):
    chance = random.Random(seed)
    signals, outputs, watch, computed, asked = shown(seed, dtype=dtype), shown(100 + seed), Watch(MODEL_INPUT), [], 0
    for n, step in enumerate(steps()):
        watch.begin(step)
        watch.see(ROW, signals[n])
        if computed:
            last = computed[-1]
            since = range(last + 1, n + 1)
            assert watch.drift == pytest.approx(mean(signals[n].float() - signals[last].float()) / mean(signals[last]), rel=1e-4)
            wanted = [mean(signals[m].float() - signals[m - 1].float()) / mean(signals[m - 1]) for m in since]
            assert watch.changes == pytest.approx(wanted, rel=1e-4)
            flow = watch.flow
            assert flow.input_norm == pytest.approx(mean(signals[n]), rel=1e-4) and flow.output_norm == pytest.approx(mean(outputs[last]), rel=1e-4)
            assert flow.travel == pytest.approx(sum(mean(signals[m].float() - signals[m - 1].float()) for m in since), rel=1e-4)
            if len(computed) > 1:
                earlier = computed[-2]
                change = mean(outputs[last] - outputs[earlier])
                assert flow.rate == pytest.approx(change / mean(signals[last].float() - signals[earlier].float()), rel=1e-4)
                assert watch.output_change == pytest.approx(change / mean(outputs[last]) / (last - earlier), rel=1e-4)
                asked += 1
            else:
                assert flow.rate is None and watch.output_change is None
        else:
            assert watch.drift is watch.flow is watch.output_change is watch.forecast_error(1) is None and watch.changes == ()
        skipped = bool(computed) and chance.random() < 0.5
        if not skipped:
            watch.learn(ROW, outputs[n])
            computed.append(n)
        watch.finish(skipped)
    assert asked > 20 and len(computed) < 25


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_forecast_is_the_polynomial_through_computed_steps_whatever_lies_between_them(order):
    make = torch.Generator().manual_seed(order)
    coefficients = torch.randn((order + 1, 40), generator=make, dtype=torch.float64)
    watch, computed = Watch(FIRST_BLOCK), []
    for n, step in enumerate(steps(14)):
        signal = sum(c * (n / 10) ** k for k, c in enumerate(coefficients)).float()
        watch.begin(step)
        watch.see(ROW, signal)
        if len(computed) > order:
            assert watch.forecast_error(order) < 1e-4
            assert order == 1 or watch.forecast_error(order - 1) > 1e-3
        elif computed:
            assert watch.forecast_error(order) == watch.forecast_error(len(computed) - 1 or 1), "of a lower order while the history is short"
        skipped = n in (3, 5, 6, 9)
        computed += [] if skipped else [n]
        watch.finish(skipped)


def test_with_one_computed_step_the_forecast_is_that_it_stays():
    watch, (first, second) = Watch(FIRST_BLOCK), steps(2)
    watch.begin(first)
    watch.see(ROW, torch.full((4,), 2.0))
    watch.finish(False)
    watch.begin(second)
    watch.see(ROW, torch.full((4,), 4.0))
    assert watch.forecast_error(3) == pytest.approx(0.5) and watch.drift == pytest.approx(1.0)


def filled(signal, count=3, row=ROW) -> tuple[Watch, list]:
    watch, at = Watch(signal), steps()
    for n in range(count):
        watch.begin(at[n])
        watch.see(row, torch.randn(6) + n)
        watch.learn(row, torch.randn(6) + n)
        watch.finish(False)
    return watch, at[count:]


def unknown(watch) -> bool:
    return watch.drift is watch.flow is watch.forecast_error(1) is watch.output_change is None and watch.changes == ()


@pytest.mark.parametrize("signal", [FIRST_BLOCK, MODULATED_INPUT, MODEL_INPUT])
def test_another_row_or_another_shape_makes_everything_unknown_until_a_step_is_computed_again(signal):
    for row, shape in ((OTHER, (6,)), (ROW, (8,))):
        watch, at = filled(signal)
        watch.begin(at[0])
        watch.see(row, torch.ones(shape))
        assert unknown(watch)
        watch.learn(row, torch.ones(6))
        watch.finish(False)
        watch.begin(at[1])
        watch.see(row, torch.full(shape, 2.0))
        assert watch.drift == pytest.approx(1.0) and watch.changes == pytest.approx((1.0,))


def test_only_the_first_row_of_an_evaluation_is_looked_at_and_its_own_output_is_learnt():
    watch, at = filled(MODEL_INPUT)
    watch.begin(at[0])
    watch.see(ROW, torch.ones(6))
    watch.see(OTHER, torch.full((6,), 50.0))
    watch.learn(OTHER, torch.full((6,), 9.0))
    watch.learn(ROW, torch.full((6,), 3.0))
    watch.learn(ROW._replace(ordinal=1), torch.full((6,), 7.0))
    watch.finish(False)
    watch.begin(at[1])
    watch.see(ROW, torch.ones(6))
    assert watch.drift == 0 and watch.flow.output_norm == pytest.approx(3.0)


def test_a_computed_step_whose_signal_was_not_shown_leaves_nothing_to_compare_with():
    watch, at = filled(FIRST_BLOCK)
    watch.begin(at[0])
    watch.finish(False)
    watch.begin(at[1])
    watch.see(ROW, torch.ones(6))
    assert unknown(watch)


def test_an_output_of_another_row_is_not_compared():
    watch, at = filled(OUTPUT)
    assert watch.output_change is not None and watch.now is None
    watch.begin(at[0])
    watch.learn(OTHER, torch.ones(6))
    watch.finish(False)
    assert watch.output_change is None


def test_a_second_evaluation_at_the_same_place_takes_the_place_of_the_first():
    clock, watch = Clock(SIGMAS, True), Watch(FIRST_BLOCK)
    for sigma, value in ((SIGMAS[0], 1.0), (SIGMAS[1], 5.0), (SIGMAS[1], 2.0), (SIGMAS[2], 3.0)):
        watch.begin(clock.tick(sigma))
        watch.see(ROW, torch.full((4,), value))
        if value == 3.0:
            assert watch.forecast_error(1) == pytest.approx(0.0, abs=1e-6), "1, 2, 3 is a line"
        watch.finish(False)


def test_a_broken_off_evaluation_leaves_no_half_of_it_behind():
    watch, at = filled(MODEL_INPUT)
    watch.begin(at[0])
    watch.see(ROW, torch.full((6,), 1e6))
    watch.learn(ROW, torch.full((6,), 1e6))
    watch.begin(at[1])
    assert watch.now is watch.output is None and not watch.known
    watch.see(ROW, torch.ones(6))
    assert watch.flow.output_norm < 100


@pytest.mark.parametrize("signal", [NOTHING, OUTPUT])
def test_who_watches_no_signal_keeps_none(signal):
    watch, _ = filled(signal)
    assert watch.before is watch.now is None and not watch.moves and (signal == OUTPUT) == bool(watch.peak)


def test_samples_are_kept_of_large_tensors_and_counted():
    watch, at, large = Watch(MODEL_INPUT), steps(), torch.randn(3, 8 * SAMPLE // 3)
    for n in range(8):
        watch.begin(at[n])
        watch.see(ROW, large + n)
        watch.learn(ROW, large * n)
        watch.finish(False)
    one = 2 * SAMPLE * 4
    assert 0 < watch.peak <= 11 * one, "four computed steps of two, one before and two now at most"
    assert all(node.signal.numel() <= 2 * SAMPLE and node.signal.is_contiguous() for node in watch.computed) and len(watch.computed) == 4
    watch.close()
    assert not watch.computed and watch.before is None


def test_what_is_shown_may_be_written_over_afterwards():
    watch, at = Watch(MODEL_INPUT), steps()
    x, v = torch.ones(6), torch.ones(6)
    watch.begin(at[0])
    watch.see(ROW, x)
    watch.learn(ROW, v)
    watch.finish(False)
    x.fill_(77.0)
    v.fill_(88.0)
    watch.begin(at[1])
    watch.see(ROW, torch.full((6,), 2.0))
    assert watch.drift == pytest.approx(1.0) and watch.flow.output_norm == pytest.approx(1.0)


def test_an_evaluation_reads_the_device_once(monkeypatch):
    reads = []
    for name in ("item", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, original=original: reads.append(self) or original(self))
    for ask in (lambda w: w.drift, lambda w: w.changes, lambda w: w.flow, lambda w: w.forecast_error(2)):
        watch, at = filled(MODEL_INPUT)
        for step in at[:5]:
            watch.begin(step)
            watch.see(ROW, torch.randn(6))
            reads.clear()
            ask(watch)
            ask(watch)
            assert len(reads) == 1
            watch.finish(True)
            assert len(reads) == 1
