"""Memory runs out: for the cache, and the run goes on without it; for the host, and its error passes through."""
import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import CONCRETE, OF_BLOCKS, QUICK, STEPS, At, attached, blocks, decisions, model, plain, ranges_kept, run, sample, spied

from pack.core.attach import RUN
from pack.core.stepcache import cache as step_cache
from pack.core.stepcache.hindcast import Hindcast
from pack.core.stepcache.levels.passage import Passage
from pack.core.store import Store

SOME = At((3, 5, 6, 8, 9))      # of 12 steps
HERE = pytest.mark.parametrize("level", CONCRETE)
EACH = pytest.mark.parametrize("name", QUICK)


class Scarce:
    """Takes the place of something that makes tensors for the cache; its n-th call, and all after that, find no memory."""

    def __init__(self, real, call):
        self.real, self.call, self.calls = real, call, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls >= self.call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.real(*args, **kwargs)


def predicting(monkeypatch, call):
    monkeypatch.setattr(step_cache, "combine", scarce := Scarce(step_cache.combine, call))
    return scarce


LACKS = {
    "to keep": (Store, "keep"), "to score": (Hindcast, "score"), "to read the scores": (Hindcast, "settle"), "to weigh": (Hindcast, "weigh"),
    "to decide": (Passage, "enter"),
}


def lacking(monkeypatch, owner, name, call):
    scarce = Scarce(getattr(owner, name), call)
    monkeypatch.setattr(owner, name, lambda *args: scarce(*args))
    return scarce


SPENT = "memory ran out for the cache"


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize("call", [1, 2, 3])
@HERE
@EACH
def test_a_prediction_without_memory_is_computed_in_full(name, level, call, split, monkeypatch):
    """The first skip is where it runs out: with nothing skipped the latent is the host's, to the bit.

    A prediction makes two tensors, itself and a sample to be scored by; the third is that of the next range of blocks, or of the next row.
    """
    patched = attached(model(name), policy=SOME, level=level, reports=(reports := []))
    if split:
        monkeypatch.setattr(type(patched), "get_free_memory", lambda self, device: 0)
    scarce = predicting(monkeypatch, call)
    wanted = sample(model(name), name)
    latent = sample(patched, name)
    (report,) = reports
    assert scarce.calls == call and SPENT in report.reason and len(report.each) == STEPS
    whole = call <= 2 * ranges_kept(level) or (level != "guided output" and not split)     # both conditions of a batch are predicted in one go
    assert torch.equal(latent, wanted) == whole
    assert [e.computed for e in report.each] == [n != 3 or whole for n in range(STEPS)]
    assert report.each[-1].why.startswith(SPENT)
    for block in blocks(name):
        assert "forward" not in vars(block)


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("lack", LACKS)
@HERE
@EACH
def test_results_that_cannot_be_kept_leave_the_run_as_the_hosts(name, level, lack, call, monkeypatch):
    if lack == "to decide" and level not in OF_BLOCKS:
        pytest.skip("this level decides nothing inside the model")
    scarce = lacking(monkeypatch, *LACKS[lack], call)
    latent, report = run(model(name), name, cached={"policy": SOME, "level": level})
    assert scarce.calls >= call
    if lack == "to keep" or call == 1:
        assert torch.equal(latent, plain(name)) and all(decisions(report))
    assert SPENT in report.reason and torch.isfinite(latent).all() and len(report.each) == STEPS


@EACH
def test_a_gate_without_memory_computes(name, monkeypatch):
    """The gate keeps the stream before the first block and its own signal."""
    lacking(monkeypatch, *LACKS["to decide"], 4)
    latent, report = run(model(name), name, cached={"policy": "first block", "policy_knobs": {"threshold": 0.0}, "level": "block range"})
    assert torch.equal(latent, plain(name)) and SPENT in report.reason


@HERE
@EACH
def test_no_memory_for_the_cache_holds_none(name, level, monkeypatch):
    held = []
    spy = spied(model(name), WrappersMP.PREDICT_NOISE, lambda executor, args, kwargs: held.append(args[2]["transformer_options"][RUN].cache.store.bytes))
    predicting(monkeypatch, 1)
    sample(attached(spy, policy=SOME, level=level), name)
    assert held[3] > 0 and held[4:] == [0] * (STEPS - 4)


@pytest.mark.parametrize("evaluation", [0, 4, 5])
@HERE
@EACH
def test_the_hosts_own_lack_of_memory_passes_through_and_leaves_nothing_behind(name, level, evaluation):
    reports: list = []
    patched = attached(model(name), policy=SOME, level=level, reports=reports)
    wanted = sample(patched, name)
    before, calls, stores = [dict(vars(b)) for b in blocks(name)], [], []
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def lack(*_):
        calls.append(1)
        if len(calls) > evaluation:
            raise error

    spy = spied(patched, WrappersMP.PREDICT_NOISE, lambda executor, args, kwargs: stores.append(args[2]["transformer_options"][RUN].cache))
    first = next(m for m in blocks(name)[0].modules() if not list(m.children()) and list(m.parameters()))
    hook = first.register_forward_pre_hook(lack)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            sample(spy, name)
    finally:
        hook.remove()
    assert caught.value is error and comfy.model_management.is_oom(error)
    assert SPENT not in reports[-1].reason and "cut short" in reports[-1].reason
    assert [dict(vars(b)) for b in blocks(name)] == before
    cache = stores[-1]
    assert cache.store.bytes == 0 and not cache.watch.computed and cache.watch.now is None and not any(h.waiting for h in cache.streams.each.values())
    assert torch.equal(sample(patched, name), wanted)

