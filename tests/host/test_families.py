"""The contract of every model family, on a tiny instance of each of the host's classes: what its facts promise, and what happens when they do not hold."""
from dataclasses import replace

import pytest
import torch
from every_class import BETWEEN, CONTROLLED, EVERY, FIRSTS, REPLACEABLE, STEPS, between, controlled, host, replayed
from harness import (
    EVERY_SECOND,
    EVERYTHING,
    At,
    Gate,
    Never,
    NeverGated,
    always,
    attached,
    blocks,
    counted,
    decisions,
    family,
    levelled,
    model,
    network,
    relative,
    run,
    sample,
)

from pack.core import run as core_run
from pack.core.families import FAMILIES, family_of
from pack.core.families.base import module_at
from pack.core.stepcache.cache import StepCache
from testbed import tiny

FEW = [(1, 0), (0, 1), (2, 1)]
MANY = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 1)]
RANGES = [(name, *bounds) for name in EVERY for bounds in (MANY if name in FIRSTS else FEW)]
# Where the first block uses what `modulated` gives: a part of it, and how that part is called with it.
USED = {
    "flux": "img_attn.qkv", "flux2": "img_attn.qkv", "chroma": "img_attn.qkv", "hunyuan_video": "img_attn.qkv", "ltxv": "attn1",
    "cosmos_predict2": "self_attn", "z_image": "adaLN_modulation", "hidream_i1": "block.adaLN_modulation",
}


def test_every_class_of_every_family_has_a_tiny_model():
    assert set(tiny.OF_FAMILY) == set(FAMILIES)
    for name, facts in FAMILIES.items():
        assert all(family_of(network(model(kind))) is facts for kind in tiny.OF_FAMILY[name])
        built = {f"{type(net).__module__}:{type(net).__qualname__}" for net in map(network, map(model, tiny.OF_FAMILY[name]))}
        assert built == set(facts.models)


@pytest.mark.parametrize("name", EVERY)
def test_computed_steps_are_those_of_the_host(name):
    latent, report = run(model(name), name, steps=STEPS, cached={"policy": NeverGated(), **levelled(1, 1)})
    assert torch.equal(latent, host(name))
    assert report.level == "block range" and all(decisions(report)) and report.evaluations == STEPS


@pytest.mark.parametrize(("name", "first", "last"), RANGES)
def test_a_skip_repeats_the_result_and_runs_the_promised_blocks_alone(name, first, last):
    every, sides = blocks(name), between(name)
    before = [dict(vars(module)) for module in (*every, *sides)]
    patched = attached(model(name), policy=EVERY_SECOND, reports=(reports := []), **levelled(first, last))
    errors, ran = replayed(patched, name, (*every, *sides), cfg=3.0 if first == 1 else 1.0)
    (report,) = reports
    assert report.level == "block range" and decisions(report).count(False) == STEPS - 1 - (family(name).warm_up > 1)
    assert max(errors) < 1e-6
    total, asked = len(every), (first, last)
    first = min(first, total - 1)
    last = 0 if name == "wan_vace" else min(last, total - first - 1)
    assert bool(report.reason) == ((first, last) != asked)
    if (first, last) != asked:
        assert "last_blocks is 0" in report.reason or f"the model has {total} blocks, so first_blocks is {first} and last_blocks {last}" in report.reason
    live = {*range(first), *range(total - last, total)}
    live |= {total + n for n, place in enumerate(BETWEEN.get(name, ("", ()))[1]) if place < first or place >= total - last - 1}
    assert [found for found, evaluation in zip(ran, report.each[1::2], strict=True) if not evaluation.computed] == [live] * decisions(report).count(False)
    assert [dict(vars(module)) for module in (*every, *sides)] == before


@pytest.mark.parametrize("name", EVERY)
def test_evaluations_are_the_blocks_that_ran_and_a_run_leaves_nothing_behind(name):
    sides = between(name) if any(side.blocks for side, _ in family(name).side_modules(network(model(name)))) else []
    every = [*blocks(name), *always(name), *sides]
    with counted(every) as calls:
        latent, report = run(model(name), name, steps=STEPS, cached=levelled(1, 1))
    assert decisions(report).count(False) == 3 and not torch.equal(latent, host(name))
    assert report.evaluations == pytest.approx(calls.total() / len(every))
    assert torch.equal(sample(model(name), name, steps=STEPS), host(name))


@pytest.mark.parametrize("name", REPLACEABLE)
def test_a_replaced_block_is_honoured(name):
    calls: list = []

    def louder(args, extra):
        calls.append(1)
        out = extra["original_block"](args)
        pair = isinstance(out["img"], tuple)
        return out | {"img": tuple(1.3 * part for part in out["img"]) if pair else 1.3 * out["img"]}

    patched = model(name).clone()
    patched.set_model_patch_replace(louder, "dit", "double_block", 1)
    wanted = sample(patched, name, steps=STEPS)
    assert relative(wanted, host(name)) > 1e-3, "the patch does too little to be missed"
    latent, _ = run(patched, name, steps=STEPS, cached={"policy": Never(), **levelled(1, 0)})
    assert torch.equal(latent, wanted)
    for first, last in ((1, 0), (0, 1)):
        calls.clear()
        errors, _ = replayed(attached(patched, policy=EVERY_SECOND, reports=(reports := []), **levelled(first, last)), name, cfg=1.0)
        assert max(errors) < 1e-6 and len(calls) == 2 * STEPS and not all(decisions(reports[0]))


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_is_honoured(name):
    prompts, wanted = controlled(name)
    latent, _ = run(model(name), name, steps=STEPS, cached={"policy": Never(), **levelled(1, 1)}, **prompts)
    assert torch.equal(latent, wanted)
    for first, last in ((0, 0), (1, 1)):
        errors, _ = replayed(attached(model(name), policy=EVERY_SECOND, reports=(reports := []), **levelled(first, last)), name, **prompts)
        assert max(errors) < 1e-5 and decisions(reports[0]).count(False) == STEPS - 1


@pytest.mark.parametrize("name", [name for name in FIRSTS if len(FAMILIES[family(name).name].stacks) > 1])
def test_streams_are_joined_as_told(name):
    """Adding up what was subtracted gives the right result wherever the tokens lie, as long as the input is the same; so the layout is looked at."""
    stacks, made, got = family(name).stacks, [], []
    every = family(name).blocks(network(model(name)))
    last = max(n for n, (stack, _) in enumerate(every) if stack is stacks[0])
    hooks = [
        every[last][1].register_forward_hook(lambda _, args, out: made.append({key: value.clone() for key, value in stacks[0].given(out).items()})),
        every[last + 1][1].register_forward_pre_hook(
            lambda _, args, kwargs: got.append(stacks[1].taken(args, kwargs)[stacks[1].stream].clone()), with_kwargs=True),
    ]
    try:
        sample(model(name), name, steps=1, cfg=1.0)
    finally:
        for hook in hooks:
            hook.remove()
    image = made[0][stacks[0].stream]
    assert torch.equal(stacks[1].image(got[0], image.shape[1]), image)
    shared = got[0].shape[1] - (5 if name == "hidream_i1" else 0)      # there the host joins another layer of its text encoder for each block
    assert shared > image.shape[1] and torch.equal(stacks[0].whole(made[0])[:, :shared], got[0][:, :shared])


@pytest.mark.parametrize(("first", "last", "tokens"), [(1, 0, 16), (3, 0, 16), (3, 1, 16 + 7), (1, 1, 16 + 7), (0, 4, 16 + 7)])
def test_text_is_kept_only_where_blocks_read_it(first, last, tokens, monkeypatch):
    shapes, learn = set(), StepCache.learn
    monkeypatch.setattr(StepCache, "learn", lambda self, row, value: shapes.add(tuple(value.shape)) or learn(self, row, value))
    run(model("flux"), "flux", steps=STEPS, cached=levelled(first, last))
    assert shapes == {(1, tokens, 128)}


# what a gate looks at ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", USED)
def test_the_modulated_input_is_what_the_first_block_uses(name):
    facts, told, used = family(name), [], []
    stack, block = facts.blocks(network(model(name)))[0]
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: told.append(facts.modulated_input(stack, block, args, kwargs).clone()), with_kwargs=True),
        module_at(block, USED[name]).register_forward_pre_hook(lambda _, args: used.append(args[0].clone())),
    ]
    try:
        sample(model(name), name, steps=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(told) >= 2
    for a, b in zip(told, used, strict=True):
        assert torch.allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-5)
    assert relative(told[-1], told[0]) > 1e-3


def test_wans_modulated_input_is_its_time_embedding():
    facts, told, made = family("wan"), [], []
    net = network(model("wan"))
    stack, block = facts.blocks(net)[0]
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: told.append(facts.modulated_input(stack, block, args, kwargs)), with_kwargs=True),
        net.time_projection.register_forward_hook(lambda _, args, out: made.append(out)),
    ]
    try:
        sample(model("wan"), "wan", steps=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert told and all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(told, made, strict=True))


@pytest.mark.parametrize("name", FIRSTS)
def test_a_gate_before_the_first_block_skips_all_blocks_or_says_why_it_cannot(name):
    signals: list = []
    inner = [next(m for part, m in block.named_modules() if isinstance(m, torch.nn.Linear) and "mod" not in part) for block in blocks(name)]
    with counted(inner) as calls, pytest.MonkeyPatch.context() as patch:
        asked = StepCache.skips
        patch.setattr(StepCache, "skips", lambda self, signal=None, row=None, x=None: signals.append(signal is not None) or asked(self, signal, row, x))
        latent, report = run(model(name), name, steps=STEPS, cfg=1.0, cached={"policy": Gate(evaluations=(3, 5, 6)), **levelled(0, 0)})
    if family(name).modulated is None:
        assert torch.equal(latent, sample(model(name), name, steps=STEPS, cfg=1.0))
        assert all(decisions(report)) and "what modulates the first block" in report.reason and not any(signals)
    else:
        assert [n for n, computed in enumerate(decisions(report)) if not computed] == [3, 5, 6] and not report.reason
        assert calls == {n: STEPS - 3 for n in range(len(blocks(name)))} and report.evaluations == pytest.approx(
            STEPS - 3 + 3 * len(always(name)) / (len(always(name)) + len(blocks(name))))
        assert signals.count(True) == STEPS


def test_a_policy_that_must_see_the_first_blocks_wants_one():
    with pytest.raises(ValueError, match="set it to 1 or more"):
        attached(model("flux"), policy="first block", **levelled(0, 0))


# single families -----------------------------------------------------------------------------------------------------
def test_wan_computes_its_first_two_evaluations():
    _, report = run(model("wan"), "wan", steps=STEPS, cached={"policy": EVERYTHING, "level": "guided output"})
    assert decisions(report)[:3] == [True, True, False]
    _, report = run(model("ltxv"), "ltxv", steps=STEPS, cached={"policy": EVERYTHING, "level": "guided output"})
    assert decisions(report)[:2] == [True, False]


def test_vace_runs_no_block_after_a_skipped_range():
    _, report = run(model("wan_vace"), "wan_vace", steps=STEPS, cached=levelled(1, 1))
    assert "wan cannot run blocks after a skipped range, so last_blocks is 0" in report.reason and not all(decisions(report))


def test_vace_whose_last_block_is_followed_by_its_own_goes_on_at_model_output(monkeypatch):
    kind = tiny.KINDS["wan_vace"]
    monkeypatch.setitem(tiny.KINDS, "wan_vace", replace(kind, config=kind.config | {"vace_layers": kind.config["num_layers"]}))
    deep = tiny.patcher("wan_vace")
    latent, report = run(deep, "wan_vace", steps=STEPS, cached={"policy": At((3, 5, 6)), **levelled(1, 0)})
    assert report.level == "model output" and "after the last block" in report.reason and decisions(report)[3] and decisions(report).count(False) == 2
    assert torch.isfinite(latent).all()


@pytest.mark.parametrize("spoilt", ["", "audio"], ids=["video", "audio"])
def test_sound_keeps_a_residual_of_its_own_and_the_worse_stream_counts(spoilt, monkeypatch):
    learnt, learn = set(), StepCache.learn
    _, clean = run(model("ltxav"), "ltxav", steps=STEPS, cfg=1.0, cached={"policy": Never(), **levelled(1, 0)})

    def spoiling(self, row, value):
        learnt.add((row.stream, value.shape[-1]))
        learn(self, row, value * (1 + self.step.evaluation % 2) if row.stream == spoilt else value)

    monkeypatch.setattr(StepCache, "learn", spoiling)
    _, report = run(model("ltxav"), "ltxav", steps=STEPS, cfg=1.0, cached={"policy": Never(), **levelled(1, 0)})
    assert learnt == {("", 64), ("audio", 32)}
    before, after = ([evaluation.hindcast_error for evaluation in each.each[2:-1]] for each in (clean, report))
    assert all(b > 2 * a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("level", ["guided output", "model output"])
@pytest.mark.parametrize("spoilt", [0, 1], ids=["video", "audio"])
def test_where_video_and_sound_lie_in_one_tensor_the_worse_of_them_counts(spoilt, level, device, monkeypatch):
    """However short: what is expected of a skip is what is expected of the stream that is predicted worst."""
    video, sound = (latent[:1].numel() for latent in tiny.noise("ltxav").unbind())
    assert video > 2 * sound, "the sound would count anyway, so the test would prove nothing"
    monkeypatch.setattr(core_run, "page_locked", torch.empty_like)
    cached = {"policy": At((5, 6)), "predictor": "hold", "level": level, "device": device}
    learn, sizes = StepCache.learn, set()

    def alone(streams):
        def scaled(self, row, value):
            sizes.add(value.shape[-1])
            keep = value.split((video, sound), -1)
            factor = 1 + self.step.evaluation % 2
            learn(self, row, torch.cat([part * (factor if n in streams else 1) for n, part in enumerate(keep)], -1))
        monkeypatch.setattr(StepCache, "learn", scaled)
        _, report = run(model("ltxav"), "ltxav", steps=STEPS, cfg=1.0, cached=cached)
        assert not any(decisions(report)[5:7])
        return [e.hindcast_error for e in report.each if e.computed][2:-1]

    one, both = alone((spoilt,)), alone((0, 1))
    assert sizes == {video + sound} and all(a > 0.6 * b > 0 for a, b in zip(one, both, strict=True))


def test_a_model_of_video_and_sound_may_be_given_video_alone():
    video = tiny.noise("ltxav").unbind()[0]
    errors, _ = replayed(attached(model("ltxav"), policy=EVERY_SECOND, reports=(reports := []), **levelled(1, 0)), "ltxav", noise=video, cfg=1.0)
    assert max(errors) < 1e-6 and decisions(reports[0]).count(False) == STEPS - 1


@pytest.mark.parametrize("level", [levelled(0, 0), {"level": "front or rear range", "level_knobs": {"border": 0.0}}, {"level": "block ranges", "level_knobs": {
    "ranges": "0, 2-"}}], ids=["all", "front", "list"])
def test_patches_after_a_block_see_the_input_of_the_blocks_as_it_came(level):
    seen: list = []

    def look(args):
        seen.append(args["img_input"].clone())
        return {"img": args["img"] + 0.1 * args["img_input"]}

    patched = model("z_image").clone()
    patched.set_model_patch(look, "double_block")
    errors, _ = replayed(attached(patched, policy=EVERY_SECOND, reports=(reports := []), **level), "z_image", cfg=1.0)
    assert max(errors) < 1e-6 and decisions(reports[0]).count(False) == STEPS - 1
    layers = len(blocks("z_image"))
    for n in range(0, len(seen), 2 * layers):
        assert all(torch.equal(value, seen[n]) for value in seen[n: n + 2 * layers])
