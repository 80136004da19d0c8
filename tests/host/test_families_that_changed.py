"""A model that is not, or no longer, what its family's facts say: the run goes on at a safer level and says so."""
from dataclasses import replace
from functools import wraps

import pytest
import torch
from harness import At, Gate, Never, blocks, decisions, family, levelled, model, network, relative, run, sample
from unets import UNET_LEVELS

from pack.core.families import FAMILIES
from pack.core.families.base import argument
from testbed import tiny

STEPS = 9       # the fewest that are not left alone
FIRSTS = [names[0] for family, names in tiny.OF_FAMILY.items() if family != "unet"]     # for UNets see test_unet.py


def altered(facts, **changes):
    """A family whose first stack is told wrongly."""
    return replace(facts, stacks=(replace(facts.stacks[0], **changes), *facts.stacks[1:]))


WRONG = {
    "container": lambda facts: altered(facts, attribute="gone"),
    "argument": lambda facts: altered(facts, inputs=(*"abcdefghijklmnopqrstuvw", "y"), stream="y", returns=("y",), joined=("y",), also=(), packed=()),
    "arity": lambda facts: altered(facts, returns=(*facts.stacks[0].returns, "third"), inputs=("third", *facts.stacks[0].inputs[1:])),
    "never called": lambda facts: replace(facts, stacks=(*facts.stacks, replace(facts.stacks[-1], attribute="idle"))),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", FIRSTS)
def test_a_model_that_is_not_as_its_family_says_goes_on_at_model_output(name, wrong, monkeypatch):
    facts, net = family(name), network(model(name))
    monkeypatch.setitem(FAMILIES, facts.name, WRONG[wrong](facts))
    if wrong == "never called":
        monkeypatch.setattr(net, "idle", torch.nn.ModuleList([torch.nn.Linear(1, 1)]), raising=False)
    before = [dict(vars(block)) for _, block in facts.blocks(net)]
    latent, report = run(model(name), name, steps=STEPS, cached={"policy": At((3, 5, 6)), **levelled(1, 0)})
    assert report.level == "model output" and "is not built as expected" in report.reason and "model output is skipped" in report.reason
    assert decisions(report).count(False) == 3 and torch.isfinite(latent).all()
    assert torch.equal(latent, run(model(name), name, steps=STEPS, cached={"policy": At((3, 5, 6)), "level": "model output"})[0])
    assert [dict(vars(block)) for _, block in facts.blocks(net)] == before


@pytest.mark.parametrize("name", [*FIRSTS, "sd15_like"])
def test_the_forward_that_runs_is_the_hosts_whatever_it_has_come_to_be(name, monkeypatch):
    """No forward is copied: what an update changes in it is there on computed steps and on skips."""
    net, calls = network(model(name)), []
    own = "_forward" if hasattr(net, "_forward") else "forward"     # the one that wrappers do not go around
    forward = getattr(type(net), own)

    @wraps(forward)
    def updated(self, *args, **kwargs):
        calls.append(1)
        out = forward(self, *args, **kwargs)
        return [1.25 * part for part in out] if isinstance(out, list) else 1.25 * out

    monkeypatch.setattr(type(net), own, updated)
    host = sample(model(name), name, steps=STEPS, cfg=1.0)
    assert calls and torch.isfinite(host).all()
    levels = [levelled(1, 0), {"level": "model output"}] if name in FIRSTS else [{"level": level} for level in ("unet depth", "unet encoder", "model output")]
    for level in levels:
        calls.clear()
        latent, report = run(model(name), name, steps=STEPS, cfg=1.0, cached={"policy": Never(), **level})
        assert torch.equal(latent, host) and len(calls) == STEPS
        calls.clear()
        _, report = run(model(name), name, steps=STEPS, cfg=1.0, cached={"policy": At((3, 5, 6)), **level})
        assert report.level == level["level"] and not report.reason
        assert len(calls) == STEPS - (3 if level["level"] == "model output" else 0)


@pytest.mark.parametrize("change", ["forward", "input_blocks", "middle_block", "output_blocks"])
@pytest.mark.parametrize("level", UNET_LEVELS)
def test_a_unet_that_is_not_as_it_was_goes_on_at_model_output(level, change, monkeypatch):
    """Its forward takes its arguments in another way, or its blocks have another name."""
    patched = tiny.patcher("sd15_like")
    net = network(patched)
    if change == "forward":
        forward = type(net)._forward
        monkeypatch.setattr(type(net), "_forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    else:
        kept = {change: net._modules.pop(change)}
        monkeypatch.setattr(type(net), "_forward", renamed(type(net)._forward, kept))
    host = sample(patched, "sd15_like", steps=STEPS)
    latent, report = run(patched, "sd15_like", steps=STEPS, cached={"policy": At((3, 5, 6)), "level": level})
    assert report.level == "model output" and "is not built as expected" in report.reason and decisions(report).count(False) == 3
    assert 0 < relative(latent, host) < 0.2
    assert torch.equal(latent, run(patched, "sd15_like", steps=STEPS, cached={"policy": At((3, 5, 6)), "level": "model output"})[0])


def renamed(forward, kept: dict):
    """A forward that finds its blocks where nobody else does."""
    @wraps(forward)
    def function(self, *args, **kwargs):
        self._modules.update(kept)
        try:
            return forward(self, *args, **kwargs)
        finally:
            for name in kept:
                del self._modules[name]
    return function


def test_a_gate_without_blocks_to_look_at_computes_everything_and_says_so(monkeypatch):
    monkeypatch.setitem(FAMILIES, "flux", WRONG["container"](FAMILIES["flux"]))
    latent, report = run(model("flux"), "flux", steps=STEPS, cached={"policy": "first block"})
    assert torch.equal(latent, sample(model("flux"), "flux", steps=STEPS)) and all(decisions(report))
    assert "must see its blocks, so everything is computed" in report.reason


def test_modulation_that_is_not_found_is_no_error(monkeypatch):
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], modulated=lambda block, argument: block.renamed(argument("vec"))))
    latent, report = run(model("flux"), "flux", steps=STEPS, cached={"policy": Gate((3, 5)), **levelled(1, 0)})
    assert torch.equal(latent, sample(model("flux"), "flux", steps=STEPS)) and all(decisions(report)) and "was not found" in report.reason


def test_an_error_of_the_model_is_the_users_and_an_argument_is_found_by_name_or_place():
    broken = model("flux").clone()

    def fails(args, extra):
        raise KeyError("a patch of the user's")

    broken.set_model_patch_replace(fails, "dit", "double_block", 1)
    with pytest.raises(KeyError, match="a patch of the user's"):
        run(broken, "flux", steps=STEPS, cached=levelled(1, 0))
    assert not any("forward" in vars(block) for block in blocks("flux"))
    assert argument(("a", "b"), "b", (1, 2), {}) == argument(("a", "b"), "b", (1,), {"b": 2}) == argument((), "b", (), {"b": 2}) == 2


def test_a_class_that_the_host_derived_from_a_known_one_is_not_taken_for_it(monkeypatch):
    derived = tiny.patcher("flux")
    derived.model.diffusion_model.__class__ = type("FluxNext", (type(network(derived)),), {})
    latent, report = run(derived, "flux", steps=STEPS, cached={"policy": At((3, 5)), **levelled(1, 0)})
    assert report.level == "guided output" and report.model == "FluxNext"
    assert "FluxNext is of no known model family, so guided output is skipped" in report.reason
    assert decisions(report).count(False) == 2 and torch.isfinite(latent).all()
