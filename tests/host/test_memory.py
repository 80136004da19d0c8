"""What the cache keeps, where, how much of it, and what the host is asked for it."""
import math
import weakref

import comfy.context_windows
import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import (
    CONCRETE,
    OF_BLOCKS,
    ONE_PHASE,
    QUICK,
    STEPS,
    At,
    attached,
    decisions,
    model,
    network,
    plain,
    ranges_kept,
    relative,
    run,
    sample,
    spied,
    windowed,
)

from pack.core import run as core_run
from pack.core.attach import RUN
from pack.core.memory import enlarged
from pack.core.reserve import token_elements
from pack.core.run import DEVICES
from pack.core.stepcache.look_back import most_bytes
from pack.core.store import STORAGE, Store, page_locked
from testbed import tiny

SOME = At((3, 5, 6, 8, 9))      # of 12 steps
FORWARD = {"guided output": {"look_back": False}, **ONE_PHASE}      # what looking back keeps is counted apart
HERE = pytest.mark.parametrize("level", CONCRETE)
EACH = pytest.mark.parametrize("name", QUICK)
PICTURES = pytest.mark.parametrize("name", QUICK[:2])    # how many tokens LTX-Video makes of a latent is not to be seen from outside


def lender(monkeypatch) -> list:
    """On a machine without GPU: memory that a stand-in for the page-locked allocator lends, in its place."""
    lent: list = []

    def allocate(value):
        memory = torch.empty_like(value)
        lent.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(core_run, "page_locked", allocate)
    return lent


# how and where ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", STORAGE)
@HERE
@EACH
def test_narrow_and_remote_snapshots_change_the_picture_by_their_rounding_alone(name, level, storage, device, monkeypatch):
    lent = lender(monkeypatch)
    cached = {"policy": SOME, "predictor": "hold", "level": level, "level_knobs": FORWARD.get(level)}
    exact, base = run(model(name), name, cached=cached)
    latent, report = run(model(name), name, cached={**cached, "storage": storage, "device": device})
    assert decisions(report) == decisions(base) and decisions(report).count(False) == 5
    off = relative(latent, exact)
    assert off == 0 if storage == "same" else 1e-6 < off < {"bf16": 2e-3, "fp8": 3e-2}[storage]
    width = {"same": 4, "bf16": 2, "fp8": 1}[storage]
    assert report.cache_bytes == pytest.approx(base.cache_bytes * width / 4, abs=8 * ranges_kept(level))
    assert bool(lent) == (device == "cpu") and not any(memory() is not None for memory in lent), "memory of the host is given back with the run"


@HERE
@EACH
def test_extrapolation_from_host_memory_is_that_from_the_gpu(name, level, monkeypatch):
    lent = lender(monkeypatch)
    cached = {"policy": SOME, "predictor": "automatic", "level": level}
    (here, base), (there, report) = (run(model(name), name, cached={**cached, "device": device}) for device in ("gpu", "cpu"))
    assert lent and torch.equal(there, here)
    # an error is measured on a sample of what has to be fetched
    assert [e.hindcast_error for e in report.each] == [e.hindcast_error for e in base.each]


def test_a_model_without_a_gpu_keeps_its_results_where_they_are():
    assert page_locked(torch.zeros(2)) is None
    (here, base), (there, report) = (run(model("flux"), "flux", cached={"device": device}) for device in DEVICES)
    assert torch.equal(here, there) and base.cache_bytes == report.cache_bytes


@EACH
def test_fp8_serves_the_last_result_alone_and_says_so(name):
    latent, report = run(model(name), name, cached={"policy": SOME, "predictor": "automatic", "storage": "fp8"})
    held, quiet = run(model(name), name, cached={"policy": SOME, "predictor": "hold", "storage": "fp8"})
    assert torch.equal(latent, held) and "fp8" in report.reason and quiet.reason == ""


@pytest.mark.parametrize(("setting", "says"), [
    ({"storage": "fp8", "predictor": "divided differences"}, "extrapolate"), ({"storage": "int4"}, "same, bf16, fp8"), ({"device": "disk"}, "gpu, cpu"),
    ({"budget_mib": -1}, "at least 0"), ({"warm_up": 0}, "at least 1"), ({"last_steps": 0}, "at least 1")])
def test_a_setting_that_cannot_be_is_refused_in_a_sentence(setting, says):
    with pytest.raises(ValueError, match=says):
        attached(model("flux"), **setting)


# budget ----------------------------------------------------------------------------------------------------------------
@HERE
@EACH
def test_a_budget_is_kept_and_told(name, level, monkeypatch):
    made: list = []
    monkeypatch.setattr(core_run, "Store", lambda *args, **kwargs: made.append(Store(*args, **kwargs)) or made[-1])
    cached = {"policy": SOME, "predictor": "automatic", "level": level, "level_knobs": FORWARD.get(level)}
    _, free = run(model(name), name, cached=cached)
    seen = []
    for share in (1.0, 0.7, 0.4, 0.2, 0.1):
        budget = int(free.cache_bytes * share)
        monkeypatch.setattr(core_run, "MIB", budget)     # the setting counts in MiB, and tiny models keep less than one
        latent, report = run(model(name), name, cached={**cached, "budget_mib": 1})
        assert report.cache_bytes <= budget and made[-1].bytes == 0
        assert torch.isfinite(latent).all() and len(report.each) == STEPS
        seen.append((made[-1].depth, made[-1].storage, decisions(report).count(False)))
        assert bool(report.reason) == (share < 1) and ("budget" in report.reason or share == 1)
        assert torch.equal(latent, plain(name)) == (made[-1].depth == 0)
    assert seen == [(3, "same", 5), (2, "same", 5), (1, "same", 5), (1, "bf16", 5), (0, "bf16", 0)]


@EACH
def test_a_budget_that_holds_one_result_predicts_as_hold_does(name, monkeypatch):
    cached = {"policy": SOME, "level": "guided output", "level_knobs": FORWARD["guided output"]}
    wanted, free = run(model(name), name, cached={**cached, "predictor": "hold"})
    monkeypatch.setattr(core_run, "MIB", free.cache_bytes)
    for predictor in ("automatic", "divided differences"):
        latent, report = run(model(name), name, cached={**cached, "predictor": predictor, "budget_mib": 1})
        assert torch.equal(latent, wanted) and "holds 1 result" in report.reason
        assert any(e.predicted_error is not None for e in report.each), "the predictor that is left is scored"


@EACH
def test_a_budget_that_is_too_small_for_it_leaves_looking_back_out(name, monkeypatch):
    cached = {"policy": SOME, "predictor": "automatic", "level": "guided output"}
    looking, free = run(model(name), name, cached=cached)
    ahead, _ = run(model(name), name, cached={**cached, "level_knobs": FORWARD["guided output"]})
    assert not torch.equal(looking, ahead)
    latent = tiny.noise(name).numel() * 4
    for latents, wanted in ((16, looking), (15, ahead)):     # eight for looking back on four skips, and as many for the rest
        monkeypatch.setattr(core_run, "MIB", latents * latent)
        got, report = run(model(name), name, cached={**cached, "budget_mib": 1})
        assert torch.equal(got, wanted) and report.cache_bytes <= latents * latent
        assert ("look back" in report.reason) == (wanted is ahead)


@HERE
def test_windows_that_moved_on_give_their_memory_back(level):
    """Context windows that are elsewhere on every step would pile up otherwise."""
    patcher = windowed(model("flux"), 3, "standard_uniform")
    counts: list = []
    spy = spied(attached(patcher, policy=At(()), level=level), WrappersMP.PREDICT_NOISE,
                lambda executor, args, kwargs: counts.append(len(args[2]["transformer_options"][RUN].cache.store.rings)))
    sample(spy, "flux", size=(8, 28), steps=24)
    assert len(counts) == 24 and max(counts[12:]) <= max(counts[:12])


# what the host is asked for --------------------------------------------------------------------------------------------
def asked(monkeypatch, patcher, name, **sampling):
    """(memory, minimum) that the host asks for before it loads, and the shapes of noise that reach the sampler."""
    told, shapes = [], []
    load = comfy.model_management.load_models_gpu

    def watch(models, memory_required=0, minimum_memory_required=None, **more):
        told.append((memory_required, minimum_memory_required))
        return load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **more)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", watch)
        sample(spied(patcher, WrappersMP.SAMPLER_SAMPLE, lambda executor, args, kwargs: shapes.append(args[4].shape)), name, **sampling)
    (first,) = told
    return first, shapes


def column(patcher, shape) -> float:
    """What the host asks for one more column of noise."""
    return patcher.model.memory_required([*shape[:-1], shape[-1] + 1]) - patcher.model.memory_required(shape)


@pytest.mark.parametrize(("sampling", "cached"), [
    ({}, {}), ({}, {"storage": "bf16"}), ({}, {"predictor": "hold"}), ({"batch": 2}, {}), ({"size": (8, 24)}, {}), ({"cfg": 1.0}, {}),
    ({"batch": 2}, {"policy": "first block", "level": "block range"})], ids=["plain", "bf16", "hold", "batch 2", "wide", "cfg 1", "first block"])
@HERE
@PICTURES
def test_the_host_is_asked_for_what_the_cache_will_hold_and_for_little_more(name, level, sampling, cached, monkeypatch):
    # So tiny a model asks for gigabytes by its formula and keeps kilobytes; a real one keeps more than a column.
    patcher = model(name)
    monkeypatch.setattr(patcher.model, "memory_usage_factor", 1e-4)
    cached = {"level": level, "predictor": "automatic", **cached}
    shape = tiny.noise(name, size=sampling.get("size", 8), batch=sampling.get("batch", 1)).shape
    (most, least), _ = asked(monkeypatch, patcher, name, **sampling)
    reports: list = []
    (more, minimum), shapes = asked(monkeypatch, attached(patcher, reports=reports, **cached), name, **sampling)
    held = reports[0].cache_bytes
    assert shapes == [shape], "the noise stays as it is"
    assert minimum - least >= held > 0 and more - most >= held
    # cfg 1 drops a condition, and text may be joined to the image, 32 tokens to the 16 of it
    slack = (2 if sampling.get("cfg") == 1 else 1) * (3 if cached["level"] in OF_BLOCKS else 1)
    assert minimum - least <= 1.02 * held * slack + most_bytes(shape, 4) * (cached["level"] == "guided output") + column(patcher, shape)


@EACH
def test_what_is_kept_in_host_memory_is_not_asked_for_on_the_gpu(name, monkeypatch):
    patcher = model(name)
    monkeypatch.setattr(patcher.model, "memory_usage_factor", 1e-4)
    (_, least), _ = asked(monkeypatch, patcher, name)
    minimum = {}
    for device in DEVICES:
        (_, minimum[device]), _ = asked(monkeypatch, attached(patcher, predictor="automatic", level="model output", device=device), name)
    assert least < minimum["cpu"] < minimum["gpu"]


@EACH
def test_no_more_than_the_budget_is_asked_for(name, monkeypatch):
    patcher = model(name)
    monkeypatch.setattr(patcher.model, "memory_usage_factor", 1e-4)
    monkeypatch.setattr(core_run, "MIB", 5000)
    (_, least), _ = asked(monkeypatch, patcher, name)
    (_, minimum), _ = asked(monkeypatch, attached(patcher, predictor="automatic", level="model output", budget_mib=1), name)
    assert 5000 <= minimum - least <= 5000 + column(patcher, tiny.noise(name).shape)


def test_a_run_that_is_off_asks_for_what_the_host_asks_for(monkeypatch):
    (wanted, _), (got, _) = (asked(monkeypatch, patcher, "flux", steps=4) for patcher in (model("flux"), attached(model("flux"))))
    assert got == wanted


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("first", ["windows", "cache"])
def test_context_windows_do_not_cut_off_what_is_asked_for(dim, first, monkeypatch):
    patcher = windowed(model("flux"), dim)
    monkeypatch.setattr(patcher.model, "memory_usage_factor", 1e-4)
    size = (24, 8) if dim == 2 else (8, 24)
    both = patcher.clone()
    comfy.context_windows.create_prepare_sampling_wrapper(both)
    (_, least), _ = asked(monkeypatch, both, "flux", size=size)
    reports: list = []
    if first == "windows":
        with_cache = attached(both, predictor="automatic", reports=reports)
    else:
        with_cache = attached(patcher, predictor="automatic", reports=reports)
        comfy.context_windows.create_prepare_sampling_wrapper(with_cache)
    (_, minimum), _ = asked(monkeypatch, with_cache, "flux", size=size)
    assert minimum - least >= reports[0].cache_bytes > 0


@pytest.mark.parametrize("name", [*QUICK[:2], "wan", "qwen_image"])
def test_the_tokens_of_a_model_are_told_from_its_shape(name):
    width = {"z_image": tiny.KINDS["z_image"].config["dim"]}.get(name, 128)
    shape, net = tiny.noise(name, size=(8, 12), batch=3).shape, network(model(name))
    assert token_elements(shape, net) == 3 * 4 * 6 * width
    assert token_elements(shape, net, text=33, references=[(1, 16, 8, 8), (1, 16, 4, 8)]) == 3 * (4 * 6 + 64 + 16 + 8) * width


def test_a_model_that_does_not_tell_its_width_is_reserved_for_by_its_latent():
    assert token_elements((1, 4, 8, 8), torch.nn.Linear(2, 2)) is None


def test_a_shape_grows_by_no_more_columns_than_it_needs():
    required = lambda shape: 10.0 * shape[0] * math.prod(shape[2:])
    assert enlarged((1, 16, 4, 6), 0, required, {}) == [1, 16, 4, 6]
    assert enlarged((1, 16, 4, 6), 41, required, {}) == [1, 16, 4, 8]
    assert enlarged((2, 16, 4, 6), 81, required, {3: 3}) == [2, 16, 6, 6], "a row of 3 x 2 is what the host sees of one"
    assert enlarged((2, 16, 5), 100, required, {2: 5}) == [4, 16, 5]
    assert enlarged((1, 16, 4, 6), 100, lambda shape: 7.0, {}) == [1, 16, 4, 6]
