"""Several GPUs, for which two threads on the CPU stand in, and torch.compile."""
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import comfy.model_management
import comfy.multigpu
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from harness import CONCRETE, QUICK, STEPS, At, attached, decisions, family, made, model, network, plain, relative, run, sample, spied

from pack.core.attach import RUN
from pack.core.report import Report
from pack.core.step import Clock
from pack.core.stepcache import cache as step_cache
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.governor import Governor
from pack.core.stepcache.hindcast import Hindcast
from pack.core.stepcache.levels import LEVELS, Call
from pack.core.stepcache.predictors import PREDICTORS
from pack.core.store import Row
from testbed import tiny

SOME = At((2, 4, 5, 7, 8, 9))
GPUS = (torch.device("cpu"), torch.device("cpu:0"))     # one and the same, and two for the host
COMPILED = "one piece"


# threads ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Asked:
    """A policy that skips every second evaluation and knows how often it was asked."""

    name = "asked"
    needs_forward: bool
    times: list

    def skip(self, view):
        time.sleep(0.0002)
        self.times.append(view.step.evaluation)
        return view.step.evaluation % 2 == 1


def rows_of(gpu: int) -> tuple:
    return tuple(Row(f"cuda:{gpu}", 0, f"prompt {gpu}", cond, None, (1, 6)) for cond in range(2))


def one_run(policy, level, pool, seed) -> tuple[list, Report, StepCache]:
    """A run by hand: two devices, two conditions each, in one batch. `pool` evaluates the devices at once, None one by one."""
    shaky, sigmas = random.Random(seed), [1 - n / STEPS for n in range(STEPS + 1)]
    cache = StepCache(policy, PREDICTORS["automatic"]().candidates(), Governor(2.0, 0.0, 4), Report())
    clock, out = Clock(sigmas, True), []

    def device(gpu, x, sigma, delays):
        def compute():
            time.sleep(delays[1])
            return (x * (1 + gpu) * sigma).sin()
        time.sleep(delays[0])
        return made(LEVELS, level).evaluate(cache, Call(rows_of(gpu), x, torch.full((2, 1), sigma)), compute)

    for n, sigma in enumerate(sigmas[:-1]):
        cache.begin(clock.tick(sigma))
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(n))
        jobs = [(gpu, x, sigma, [shaky.random() * 0.0005 for _ in range(2)]) for gpu in range(2)]
        if pool:
            out.append([job.result() for job in [pool.submit(device, *job) for job in jobs]])
        else:
            out.append([device(*job) for job in jobs])
        cache.finish()
    return out, cache.report, cache


def test_threads_get_what_one_after_the_other_gets():
    """Fifty rounds with delays that differ."""
    with ThreadPoolExecutor(2) as pool:
        for seed in range(50):
            results = []
            for workers in (None, pool):
                policy = Asked(False, [])
                out, report, cache = one_run(policy, "model output", workers, seed)
                assert policy.times == sorted(set(policy.times)), "one decision for each evaluation"
                rings = {row: [(s.step, s.value) for s in cache.store.get(row)] for gpu in range(2) for row in rows_of(gpu)}
                results.append((out, report, rings))
            (one, base, kept), (other, report, found) = results
            assert all(torch.equal(a, b) for before, after in zip(one, other, strict=True) for a, b in zip(before, after, strict=True))
            for key in ("computed", "share", "predicted_error", "hindcast_error", "why"):
                assert [getattr(e, key) for e in report.each] == [getattr(e, key) for e in base.each]
            assert decisions(report).count(False) == 5
            for row, ring in kept.items():
                assert len(ring) == 3 and [step for step, _ in ring] == [step for step, _ in found[row]], "no snapshot is lost"
                assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ring, found[row], strict=True))


def test_threads_never_meet_inside_the_store_or_the_scores(monkeypatch):
    inside: list = []

    def alone(call):
        def guarded(*args, **kwargs):
            inside.append(call)
            time.sleep(0.002)
            assert inside == [call], "two threads at once"
            inside.remove(call)
            return call(*args, **kwargs)
        return guarded

    monkeypatch.setattr(step_cache.Store, "put", alone(step_cache.Store.put))
    monkeypatch.setattr(Hindcast, "score", alone(Hindcast.score))
    with ThreadPoolExecutor(2) as pool:
        one_run(Asked(False, []), "model output", pool, 0)


def test_threads_that_all_bring_a_signal_get_one_decision():
    """A gate decides on the first call of an evaluation, whichever thread makes it."""
    signal = torch.ones(4)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            policy = Asked(True, [])
            cache = StepCache(policy, PREDICTORS["hold"]().candidates(), Governor(2.0, 0.0, 4), Report())
            clock = Clock([1 - n / STEPS for n in range(STEPS + 1)], True)
            for n in range(6):
                cache.begin(clock.tick(1 - n / STEPS))
                start = threading.Barrier(4)

                def ask(gpu, cache=cache, start=start):
                    start.wait()
                    return cache.skips(signal * (1 + gpu), rows_of(gpu)[0])

                answers = {job.result() for job in [pool.submit(ask, gpu) for gpu in range(4)]}
                assert len(answers) == 1
                (skip,) = answers
                for row in () if skip else rows_of(0):
                    cache.learn(row, torch.ones(1, 6))
                cache.ran(1, 0.0 if skip else 1.0)
                cache.finish()
            assert policy.times == [1, 2, 3, 4, 5]


def test_memory_that_runs_out_on_one_gpu_does_not_take_from_another_in_mid_use(monkeypatch):
    """One thread finds no memory while the other has found its row ready and is about to predict."""
    ready, gone = threading.Event(), threading.Event()
    combine = step_cache.combine

    def slow(weights, snapshots, anchor=None, **more):
        if threading.current_thread().name == "second":
            ready.wait(5)
            raise torch.OutOfMemoryError("no memory")
        return combine(weights, snapshots, anchor, **more)

    policy = Asked(False, [])
    cache = StepCache(policy, PREDICTORS["hold"]().candidates(), Governor(2.0, 0.0, 4), Report())
    clock = Clock([1 - n / STEPS for n in range(STEPS + 1)], True)
    level, out = made(LEVELS, "model output"), {}
    waits = cache.ready

    def look(row, shape=None):
        answer = waits(row, shape)
        if threading.current_thread().name == "first" and row.cond == 1:
            ready.set()
            gone.wait(5)
        return answer

    def device(gpu, sigma):
        out[gpu] = level.evaluate(cache, Call(rows_of(gpu), torch.ones(2, 6), torch.full((2, 1), sigma)), lambda: torch.full((2, 6), 0.25 + gpu))
        if gpu == 1:
            gone.set()

    for n in range(3):
        cache.begin(clock.tick(1 - n / STEPS))
        if n == 1:
            gone.clear()
            monkeypatch.setattr(step_cache, "combine", slow)
            monkeypatch.setattr(cache, "ready", look)
        threads = [threading.Thread(target=device, args=(gpu, 1 - n / STEPS), name=("first", "second")[gpu]) for gpu in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(out) == [0, 1], "a thread has failed"
        if n == 1:
            assert cache.shares.count(0.0) == cache.shares.count(1.0) == 2
            assert torch.allclose(out[0], 1 - (1 - 0.25) * (1 - 1 / STEPS) * torch.ones(2, 6)) and torch.equal(out[1], torch.full((2, 6), 1.25))
            assert cache.store.bytes > 0, "what the other thread used is there until nobody does"
        out.clear()
        cache.finish()
        assert (cache.store.bytes > 0) == (n == 0)
    assert [e.computed for e in cache.report.each] == [True, False, True]
    assert cache.report.each[-1].why.startswith("memory ran out")


def on_two(name: str, patched, rounds=None):
    """The model on two devices of the host's, each with a thread of its own, which take their time."""
    second = tiny.patcher(name)
    comfy.model_management.load_models_gpu([second])
    shaky = random.Random(rounds)
    used: set = set()

    def outer(executor, *args, **kwargs):
        guider = executor.class_obj
        second.pre_run()
        guider.model_options["multigpu_clones"] = dict(zip(GPUS, (guider.model_patcher, second), strict=True))
        guider.model_options["multigpu_thread_pool"] = comfy.multigpu.MultiGPUThreadPool(list(GPUS))
        return executor(*args, **kwargs)

    def slow(executor, args, kwargs):
        time.sleep(shaky.random() * 0.002)
        used.add(threading.current_thread().name)

    clone = spied(patched, WrappersMP.APPLY_MODEL, slow)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test.gpus", outer)
    return clone, used


@pytest.mark.parametrize("predictor", ["hold", "automatic"])
@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", QUICK)
def test_the_hosts_threads_make_the_picture_of_one_thread(name, level, predictor, monkeypatch):
    cached = {"policy": SOME, "predictor": predictor, "level": level}
    with monkeypatch.context() as patch:
        patch.setattr(type(model(name)), "get_free_memory", lambda self, device: 0)      # conditions one by one, as the threads get them
        alone, base = run(model(name), name, cached=cached)
    for rounds in range(3):
        patched, used = on_two(name, attached(model(name), reports=(reports := []), **cached), rounds)
        latent = sample(patched, name)
        (report,) = reports
        assert len(used) == 2, "two threads"
        assert decisions(report) == decisions(base) and report.evaluations == base.evaluations and report.cache_bytes == base.cache_bytes
        assert torch.allclose(latent, alone, rtol=1e-4, atol=1e-4)
    assert relative(alone, plain(name)) > 1e-4 and decisions(base).count(False) == 6


@pytest.mark.parametrize("name", QUICK)
def test_a_gate_on_several_gpus_makes_one_decision_and_a_picture_near_the_hosts(name):
    patched, used = on_two(name, attached(
        model(name), policy="first block", policy_knobs={"threshold": 0.3}, level="block range", reports=(reports := [])))
    latent = sample(patched, name)
    assert len(used) == 2 and relative(latent, plain(name)) < 0.2
    assert all(e.share == 1 or not e.computed for e in reports[0].each) and reports[0].reason == ""


# torch.compile -----------------------------------------------------------------------------------------------------------
class Counting:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name: str, keys: list[str], backend="eager", patcher=None):
    clone = (patcher or model(name)).clone()
    set_torch_compile_wrapper(clone, backend=backend, keys=keys)
    return clone


BLOCKS = {"flux": ["diffusion_model.double_blocks.1", "diffusion_model.single_blocks.0", "diffusion_model.single_blocks.2"],
          "z_image": ["diffusion_model.layers.0", "diffusion_model.layers.3"]}


@pytest.mark.parametrize("before", [True, False], ids=["compiled first", "compiled last"])
@pytest.mark.parametrize("name", QUICK)
def test_a_model_compiled_whole_is_skipped_at_its_output(name, before):
    reports: list = []
    cached = {"policy": SOME, "predictor": "automatic", "reports": reports}
    if before:
        patched = attached(compiled(name, ["diffusion_model"]), level="block range", **cached)
    else:
        patched = compiled(name, ["diffusion_model"], patcher=attached(model(name), level="block range", **cached))
    latent = sample(patched, name)
    wanted, base = run(model(name), name, cached={"policy": SOME, "predictor": "automatic", "level": "model output"})
    (report,) = reports
    assert report.level == "model output" and COMPILED in report.reason
    assert decisions(report) == decisions(base) and report.evaluations == base.evaluations == STEPS - 6
    assert torch.allclose(latent, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", ["guided output", "model output"])
@pytest.mark.parametrize("name", QUICK[:1])
def test_other_levels_stay_where_they_are_under_torch_compile(name, level):
    reports: list = []
    latent = sample(attached(compiled(name, ["diffusion_model"]), policy=SOME, level=level, reports=reports), name)
    wanted, _ = run(model(name), name, cached={"policy": SOME, "level": level})
    assert reports[0].level == level and reports[0].reason == "" and torch.allclose(latent, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", QUICK[:1])
def test_a_gate_has_nothing_to_see_in_a_model_compiled_whole_and_says_so(name):
    reports: list = []
    latent = sample(attached(compiled(name, ["diffusion_model"]), policy="first block", level="block range", reports=reports), name)
    assert all(decisions(reports[0])) and COMPILED in reports[0].reason and "first block" in reports[0].reason
    assert torch.allclose(latent, plain(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", QUICK[:1])
def test_a_model_compiled_whole_is_not_compiled_anew_in_the_next_run(name):
    """The second of them has too few steps, so that the cache is off."""
    backend = Counting()
    patched = attached(compiled(name, ["diffusion_model"], backend), policy=SOME, level="block range")
    sample(patched, name)
    first = backend.graphs
    for steps in (4, STEPS):
        sample(patched, name, steps=steps)
    assert backend.graphs == first > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_compiled_one_by_one_are_skipped_like_any(name):
    reports: list = []
    backend = Counting()
    patched = attached(compiled(name, BLOCKS[name], backend), policy=SOME, predictor="automatic", level="block range", reports=reports)
    latent = sample(patched, name)
    wanted, base = run(model(name), name, cached={"policy": SOME, "predictor": "automatic", "level": "block range"})
    assert reports[0].level == "block range" and reports[0].reason == "" and backend.graphs > 0
    assert decisions(reports[0]) == decisions(base) and reports[0].evaluations == base.evaluations
    assert torch.allclose(latent, wanted, rtol=1e-4, atol=1e-4)
    graphs = backend.graphs
    sample(patched, name)
    assert backend.graphs == graphs, "a second run compiles nothing"
    for _, block in family(name).blocks(network(model(name))):
        assert "forward" not in vars(block)


@pytest.mark.parametrize("name", QUICK)
def test_a_compiled_model_in_the_place_of_the_model_is_found_too(name):
    """Other packs leave it as an object patch, which stays in its place after the run."""
    clone = tiny.patcher(name)
    clone.add_object_patch("diffusion_model", torch.compile(network(clone), backend="eager"))
    reports: list = []
    patched = attached(clone, policy=SOME, level="block range", reports=reports)
    for n in range(2):
        sample(patched, name)
        assert reports[n].level == "model output" and COMPILED in reports[n].reason and decisions(reports[n]).count(False) == 6


def test_a_wrapper_of_torch_compile_that_hides_its_modules_is_taken_to_hold_all():
    clone = model("flux").clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    reports: list = []
    sample(attached(clone, policy=SOME, level="block range", reports=reports), "flux")
    assert reports[0].level == "model output" and COMPILED in reports[0].reason


def test_a_run_is_in_the_options_of_a_threads_call():
    """What threads share is the run; the host copies the options for each."""
    seen: set = set()
    patched = attached(model("flux"), policy=SOME, level="model output")
    two, _ = on_two("flux", spied(patched, WrappersMP.APPLY_MODEL, lambda executor, args, kwargs: seen.add(id(args[5][RUN]))))
    sample(two, "flux")
    assert len(seen) == 1
