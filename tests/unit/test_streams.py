"""Streams: each is predicted by what serves it best, and the one predicted worst decides."""
import pytest
import torch
from test_hindcast import CLOCK, HOLD, LINE, PARABOLA, STEPS

from pack.core.report import Report
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.governor import Governor
from pack.core.stepcache.streams import MAIN, Streams
from pack.core.store import Row, Snapshot

CANDIDATES = (HOLD, LINE, PARABOLA)
VIDEO, SOUND = "", "audio"


def line(n: int, seed: int = 0) -> torch.Tensor:
    start, slope = torch.randn(2, 1, 1, 24, generator=torch.Generator().manual_seed(seed))
    return start + slope * n


def noise(n: int) -> torch.Tensor:
    """Around a constant: the last value is the best guess, and every line through two of them is worse."""
    return 2 + 0.3 * torch.randn(1, 1, 10, generator=torch.Generator().manual_seed(n))


def scored(*made, until: int = 8) -> Streams:
    """`made`: (stream, what it is at a step)."""
    streams = Streams(CANDIDATES)
    for n in range(1, until):
        streams.choose(tuple(STEPS[max(0, n - 3): n]), STEPS[n])
        for stream, value in made:
            streams.of(stream).score([Snapshot(STEPS[k], value(k)) for k in range(max(0, n - 3), n)], STEPS[n], value(n))
        streams.settle()
    return streams


@pytest.mark.parametrize("order", [1, -1])
def test_each_stream_has_the_predictor_that_serves_it_best(order):
    streams = scored(*((VIDEO, line), (SOUND, noise))[::order])
    streams.choose(tuple(STEPS[5:8]), STEPS[8])
    assert streams.able(VIDEO, 3) in (LINE, PARABOLA) and streams.able(SOUND, 3) == HOLD


def test_the_stream_that_is_predicted_worst_tells_the_error():
    alone = [scored((stream, value)) for stream, value in ((VIDEO, line), (SOUND, noise))]
    good, bad = (streams.choose(tuple(STEPS[5:8]), STEPS[8]) for streams in alone)
    both = scored((VIDEO, line), (SOUND, noise))
    assert good < 1e-4 < 0.1 < bad == both.choose(tuple(STEPS[5:8]), STEPS[8])
    assert both.last == alone[1].last > alone[0].last


def test_a_row_of_no_known_stream_is_predicted_as_the_worst_one_is():
    streams = scored((VIDEO, line), (SOUND, noise))
    streams.choose(tuple(STEPS[5:8]), STEPS[8])
    assert streams.able("depth", 3) == HOLD


def test_nothing_is_expected_while_a_stream_was_never_scored():
    streams = Streams(CANDIDATES)
    assert streams.choose((), STEPS[0]) is None and not streams.best
    assert streams.choose(tuple(STEPS[:2]), STEPS[2]) is None and streams.able(MAIN, 2) == LINE


@pytest.mark.parametrize(("most", "left"), [(3, CANDIDATES), (2, (HOLD, LINE)), (0, (HOLD,))])
def test_predictors_that_need_more_snapshots_than_there_are_leave_every_stream(most, left):
    streams = scored((VIDEO, line), (SOUND, noise))
    streams.narrow(most)
    assert streams.candidates == left and all(streams.of(stream).candidates == left for stream in (VIDEO, SOUND, "new"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_two_latents_in_one_tensor_each_is_predicted_by_its_own_predictor(dtype):
    row, clock = Row("cpu", 0, "uuid", 0, None, (1, 34)), type(CLOCK)(CLOCK.sigmas, True)

    class Never:
        name, needs_forward = "never", False

        def skip(self, view):
            return view.step.evaluation == 8

    cache = StepCache(Never(), CANDIDATES, Governor(2.0, 0.0, 4), Report())
    cache.packed = (24, 10)
    for n in range(9):
        cache.begin(clock.tick(CLOCK.sigmas[n]))
        if cache.skips():
            said = cache.predict(row)
        else:
            cache.learn(row, torch.cat([line(n), noise(n)], -1).to(dtype))
        cache.ran(1, 1.0)
        cache.finish()
    video, sound = said.split(cache.packed, -1)
    torch.testing.assert_close(video, line(8).to(dtype), rtol=1e-2 if dtype is torch.float16 else 1e-4, atol=1e-2 if dtype is torch.float16 else 1e-4)
    assert torch.equal(sound, noise(7).to(dtype)) and said.dtype is dtype
