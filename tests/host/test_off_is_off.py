"""Off means off: bit-identical to the host, and nothing stays behind on the model."""
import gc
import itertools
import weakref

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import CONCRETE, NAMES, OF_BLOCKS, QUICK, Never, NeverGated, always, attached, blocks, decisions, model, network, plain, run, sample

from pack.core import attach
from pack.core.run import Run
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.nodes.step_cache import StepCache as Node
from testbed import tiny

OFF = {
    "error control": {"policy": "error control", "policy_knobs": {"tolerance": 0.0}, "predictor": "automatic"},
    "first block": {"policy": "first block", "policy_knobs": {"threshold": 0.0}},
    "interval": {"policy": "interval", "policy_knobs": {"interval": 1}},
    "TeaCache": {"policy": "TeaCache", "policy_knobs": {"threshold": 0.0, "coefficients": "flux"}},
    "EasyCache": {"policy": "EasyCache", "policy_knobs": {"threshold": 0.0}},
    "MagCache": {"policy": "MagCache", "policy_knobs": {"threshold": 0.0, "curve": "flux"}},
    "CG-Taylor": {"policy": "CG-Taylor", "policy_knobs": {"gate": 0.0}},
    "ZEUS": {"policy": "ZEUS", "policy_knobs": {"preset": "custom", "start": 0, "end": 0}},
    "schedule": {"policy": "schedule", "policy_knobs": {"preset": "custom", "steps": ",".join(["1"] * 12)}},
    "temporal delta": {"policy": "temporal delta", "policy_knobs": {"threshold": 0.0}},
    "centred interval": {"policy": "centred interval", "policy_knobs": {"interval": 1}},
    "key steps": {"policy": "key steps", "end_percent": 0.0},
    "profile": {"policy": "profile"},
    "never": {"policy": Never(), "predictor": "automatic"},
    "never, gated": {"policy": NeverGated(), "predictor": "automatic"},
}


def possible(off: str, level: str) -> bool:
    if off == "EasyCache":
        return level not in OF_BLOCKS
    return LEVELS[level].gates or off not in ("first block", "TeaCache", "CG-Taylor", "never, gated")


def test_every_policy_has_an_off_position_that_is_tested():
    assert set(POLICIES) <= set(OFF)


@pytest.mark.parametrize(("off", "level"), [pair for pair in itertools.product(OFF, CONCRETE) if possible(*pair)])
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_computes_every_step_is_bit_identical_to_the_host(name, off, level):
    latent, report = run(model(name), name, cached={**OFF[off], "level": level})
    assert torch.equal(latent, plain(name))
    assert report.state == "ran" and all(decisions(report)) and report.evaluations == len(report.each) == 12


@pytest.mark.parametrize("name", NAMES)
def test_a_disabled_node_hands_on_the_very_model(name):
    assert Node.execute(model(name), enabled=False).result[0] is model(name)


@pytest.mark.parametrize("level", CONCRETE)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_behind_after_a_run_that_skips(name, level, monkeypatch):
    alive = []
    for kind in (Run, StepCache):
        made = kind.__init__

        def remembered(self, *args, made=made, **kwargs):
            alive.append(weakref.ref(self))
            made(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", remembered)
    every = [*blocks(name), *always(name), network(model(name))]
    before = [dict(vars(block)) for block in every]
    hooks = dict(model(name).object_patches), {key: dict(value) for key, value in model(name).wrappers.items()}
    patched = attached(model(name), level=level, reports=[])
    latent = sample(patched, name)
    assert not torch.equal(latent, plain(name)), "no step was skipped, so the test would prove nothing"
    assert [dict(vars(block)) for block in every] == before
    assert (dict(model(name).object_patches), {key: dict(value) for key, value in model(name).wrappers.items()}) == hooks
    for options in (patched.model_options, model(name).model_options):
        assert attach.RUN not in options["transformer_options"]
    assert attach.KEY not in model(name).model_options["transformer_options"]
    gc.collect()
    assert len(alive) == 2 and not any(ref() for ref in alive)
    assert torch.equal(sample(model(name), name), plain(name))


def test_wrappers_around_ours_do_not_see_the_run():
    seen = []

    def outermost(executor, *args, **kwargs):
        seen.append(attach.RUN in executor.class_obj.model_options["transformer_options"])
        result = executor(*args, **kwargs)
        seen.append(attach.RUN in executor.class_obj.model_options["transformer_options"])
        return result

    patched = model("flux").clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test.outermost", outermost)
    sample(attached(patched), "flux")
    assert seen == [False, False]


@pytest.mark.parametrize("name", NAMES)
def test_applying_the_node_twice_is_applying_it_once_and_the_later_settings_win(name):
    reports: list = []
    once, first = run(model(name), name, cached={"policy_knobs": {"interval": 3}})
    twice = attached(attached(model(name), policy_knobs={"interval": 2}, reports=reports), policy_knobs={"interval": 3}, reports=reports)
    assert all(len(entries) == 1 for kind in twice.wrappers.values() for key, entries in kind.items() if key == attach.KEY)
    assert torch.equal(sample(twice, name), once)
    (report,) = reports
    assert decisions(report) == decisions(first)


@pytest.mark.parametrize("name", QUICK)
def test_a_block_that_owns_its_forward_keeps_it(name):
    """As a compiled block does."""
    patched, calls = tiny.patcher(name), []
    block = blocks(name, patched)[1]
    own = block.forward
    block.forward = owned = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    latent, _ = run(patched, name, cached={"level": "block range"})
    assert vars(block)["forward"] is owned and calls
    assert torch.equal(latent, run(model(name), name, cached={"level": "block range"})[0])
    assert not any("forward" in vars(other) for other in blocks(name, patched) if other is not block)
