"""The contract of levels with ranges of blocks, on a model of every class: lists of ranges, the front or the rear range, and a decision for each."""
from contextlib import contextmanager

import pytest
import torch
from every_class import BETWEEN, CONTROLLED, EVERY, FIRSTS, REPLACEABLE, STEPS, between, controlled, host, replayed
from harness import (
    EVERY_SECOND,
    EVERYTHING,
    Never,
    always,
    attached,
    blocks,
    counted,
    decisions,
    family,
    model,
    relative,
    replay_errors,
    run,
    sample,
    sample_by,
)

from pack.core.run import Run
from pack.core.stepcache.cache import StepCache
from pack.core.stepcache.each_range import EachRange
from pack.core.stepcache.levels.block_ranges import ranges_of
from testbed import tiny

LISTS = {       # of the number of blocks
    "front": lambda n: "0-1", "one": lambda n: "1", "apart": lambda n: f"0, {n - 1}", "across": lambda n: f"1-{n - 2}", "in turn": lambda n: "0-1, 2-",
    "all": lambda n: "0-",
}


def listed(name: str, kind: str) -> dict:
    return {"level": "block ranges", "level_knobs": {"ranges": LISTS[kind](len(blocks(name)))}}


def halves(border: float) -> dict:
    return {"level": "front or rear range", "level_knobs": {"border": border}}


def places(name: str, told: list[tuple[int, int | None]]) -> set[int]:
    """What runs on a skip of ranges, given by first and last block: blocks, and behind them what runs between blocks."""
    total = len(blocks(name))
    ends = [(first, total - 1 if last is None else last) for first, last in told]
    live = {n for n in range(total) if not any(first <= n <= last for first, last in ends)}
    return live | {total + n for n, place in enumerate(BETWEEN.get(name, ("", ()))[1]) if not any(first <= place < last for first, last in ends)}


def assert_skips(name: str, level: dict, live: set[int], **sampling):
    """Every place of the schedule twice: the second time is a skip, repeats the first and runs what is told alone."""
    every = [*blocks(name), *between(name)]
    before = [dict(vars(module)) for module in every]
    patched = attached(model(name), policy=EVERY_SECOND, reports=(reports := []), **level)
    errors, ran = replayed(patched, name, every, **sampling)
    (report,) = reports
    assert report.level == level["level"] and not report.reason
    assert decisions(report).count(False) == STEPS - 1 - (family(name).warm_up > 1)
    assert max(errors) < 1e-6
    found = [seen for seen, evaluation in zip(ran, report.each[1::2], strict=True) if not evaluation.computed]
    assert found == [live] * len(found)
    assert [dict(vars(module)) for module in every] == before


# lists of ranges -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("name", [name for name in EVERY if name != "wan_vace"])
def test_a_skip_repeats_the_result_and_leaves_out_the_blocks_of_the_list_alone(name, kind):
    level = listed(name, kind)
    assert_skips(name, level, places(name, list(ranges_of(level["level_knobs"]["ranges"]))), cfg=3.0 if kind == "apart" else 1.0)


@pytest.mark.parametrize("name", EVERY)
def test_computed_steps_are_those_of_the_host_and_the_blocks_that_ran_are_counted(name):
    kind = "all" if name == "wan_vace" else "apart"
    latent, report = run(model(name), name, steps=STEPS, cached={"policy": Never(), **listed(name, kind)})
    assert torch.equal(latent, host(name)) and report.evaluations == STEPS and report.level == "block ranges"
    if name != "wan_vace":
        every = [*blocks(name), *always(name)]
        with counted(every) as calls:
            _, report = run(model(name), name, steps=STEPS, cached=listed(name, kind))
        assert not all(decisions(report)) and report.evaluations == pytest.approx(calls.total() / len(every))
    assert torch.equal(sample(model(name), name, steps=STEPS), host(name))


@pytest.mark.parametrize("kind", [kind for kind in LISTS if kind != "all"])
def test_blocks_that_cannot_run_after_a_range_are_not_asked_to(kind):
    """VACE's own blocks go on from one another."""
    latent, report = run(model("wan_vace"), "wan_vace", steps=STEPS, cached=listed("wan_vace", kind))
    assert report.level == "model output" and "wan cannot run blocks after a skipped range, so model output is skipped" in report.reason
    assert torch.isfinite(latent).all() and not all(decisions(report))


@pytest.mark.parametrize(("told", "where"), [("1, 90-95", "0 to "), ("2-40", "0 to "), ("60-", "0 to "), ("77", "0 to ")])
@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_a_list_for_a_larger_model_is_told_and_model_output_skipped_instead(name, told, where):
    _, report = run(model(name), name, steps=STEPS, cached={"level": "block ranges", "level_knobs": {"ranges": told}})
    total = len(blocks(name))
    assert f"ranges '{told}' names a block behind the last" in report.reason and f"has {total} here, {where}{total - 1}, so" in report.reason
    assert report.level == "model output" and not all(decisions(report))


def test_a_gate_is_shown_the_blocks_before_the_first_range_and_wants_one():
    seen: dict = {}
    for level in ({"level": "block range"}, {"level": "block ranges"}):
        with pytest.MonkeyPatch.context() as patch:
            asked, told = StepCache.skips, seen.setdefault(level["level"], [])
            patch.setattr(StepCache, "skips", lambda self, signal=None, row=None, x=None, asked=asked, told=told: (
                told.append(signal.clone()) if signal is not None else None) or asked(self, signal, row, x))
            run(model("z_image"), "z_image", steps=STEPS, cfg=1.0, cached={"policy": "first block", "policy_knobs": {"threshold": 0.0}, **level})
    (one, several) = seen.values()
    assert len(one) == STEPS and all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    with pytest.raises(ValueError, match="'first block' must see the first blocks run, and ranges '0-1' begins with block 0; begin at 1 or later"):
        attached(model("flux"), policy="first block", level="block ranges", level_knobs={"ranges": "0-1"})


# the front or the rear range -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("border", [0.0, 1.0], ids=["front", "rear"])
@pytest.mark.parametrize("name", [name for name in EVERY if name != "wan_vace"])
def test_the_rear_half_is_skipped_before_the_border_and_the_front_half_after_it(name, border):
    total = len(blocks(name))
    half = max(round(total / 2), 1)
    assert_skips(name, halves(border), places(name, [(total - half, None)] if border else [(0, half - 1)]), cfg=3.0 if name in FIRSTS else 1.0)


@pytest.mark.parametrize("name", [name for name in FIRSTS if name != "wan_vace"])
def test_where_the_phase_changes_the_step_is_computed_and_the_record_says_why(name):
    total, now = len(blocks(name)), []
    half = max(round(total / 2), 1)
    with counted(blocks(name)) as calls:
        begin = Run.begin

        def begun(self, *args):
            now.append(set(calls))
            calls.clear()
            begin(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "begin", begun)
            latent, report = run(model(name), name, steps=12, cfg=1.0, cached={"policy": EVERYTHING, "max_consecutive_skips": 3, **halves(0.5)})
        now.append(set(calls))
    ran = now[1:]
    assert torch.isfinite(latent).all() and report.each[6].computed and report.each[6].why == "the phase changes"
    assert [e.why for e in report.each].count("the phase changes") == 1
    skipped = [n for n, computed in enumerate(decisions(report)) if not computed]
    assert {n < 6 for n in skipped} == {True, False}
    for n in range(12):
        whole = set(range(total))
        assert ran[n] == (whole if n not in skipped else whole - set(range(total - half, total)) if n < 6 else whole - set(range(half)))


def test_one_range_is_kept_at_a_time(monkeypatch):
    kept, put = [], StepCache.finish
    monkeypatch.setattr(StepCache, "finish", lambda self: put(self) or kept.append({row.blocks for row in self.store.rings}))
    run(model("flux"), "flux", steps=12, cached=halves(0.5))
    assert kept == [{(3, 5)} if n < 6 else {(0, 2)} for n in range(12)] and len(blocks("flux")) == 5


def test_a_share_of_all_blocks_is_block_range_without_first_blocks():
    everything = {"level": "front or rear range", "level_knobs": {"border": 1.0, "share": 1.0}}
    wanted, _ = run(model("flux"), "flux", cached={"level": "block range", "level_knobs": {"first_blocks": 0}})
    latent, report = run(model("flux"), "flux", cached=everything)
    assert report.evaluations == report.computed and relative(latent, wanted) < 1e-6


# what others put on the model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [halves(0.0), halves(1.0), {"level": "block ranges", "level_knobs": {"ranges": "0-1, 2-"}}], ids=["front", "rear", "list"])
@pytest.mark.parametrize("name", [name for name in REPLACEABLE if name != "wan_vace"])
def test_a_replaced_block_is_honoured(name, level):
    calls: list = []

    def louder(args, extra):
        calls.append(1)
        out = extra["original_block"](args)
        return out | {"img": tuple(1.3 * part for part in out["img"]) if isinstance(out["img"], tuple) else 1.3 * out["img"]}

    patched = model(name).clone()
    patched.set_model_patch_replace(louder, "dit", "double_block", 1)
    wanted = sample(patched, name, steps=STEPS)
    assert relative(wanted, host(name)) > 1e-3, "the patch does too little to be missed"
    latent, _ = run(patched, name, steps=STEPS, cached={"policy": Never(), **level})
    assert torch.equal(latent, wanted)
    calls.clear()
    errors, _ = replayed(attached(patched, policy=EVERY_SECOND, reports=(reports := []), **level), name, cfg=1.0)
    assert max(errors) < 1e-6 and len(calls) == 2 * STEPS and not all(decisions(reports[0]))


def test_a_patch_around_the_end_of_a_range_is_told_and_everything_computed():
    patched = model("flux").clone()
    patched.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 0)
    wanted = sample(patched, "flux", steps=STEPS)
    latent, report = run(patched, "flux", steps=STEPS, cached={"level": "block ranges", "level_knobs": {"ranges": "0, 1-2"}})
    assert torch.equal(latent, wanted) and all(decisions(report))
    assert "a patch goes around the first or the last block of a range, so block ranges cannot skip; choose guided output" in report.reason


@pytest.mark.parametrize("level", [halves(0.0), halves(1.0), *({"level": "block ranges", "level_knobs": {"ranges": told}} for told in ("0, 1-", "1", "0-1"))],
                         ids=["front", "rear", "all", "one", "first two"])
@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_is_added_once(name, level):
    prompts, wanted = controlled(name)
    latent, _ = run(model(name), name, steps=STEPS, cached={"policy": Never(), **level}, **prompts)
    assert torch.equal(latent, wanted)
    errors, _ = replayed(attached(model(name), policy=EVERY_SECOND, reports=(reports := []), **level), name, **prompts)
    assert max(errors) < 1e-5 and decisions(reports[0]).count(False) == STEPS - 1


@pytest.mark.parametrize("level", ["front or rear range", "block ranges"])
@pytest.mark.parametrize("name", ["flux", "z_image", "ltxv"])
def test_half_precision_blocks_after_a_range_are_given_what_they_were_given(name, level):
    patched = attached(tiny.patcher(name, dtype=torch.bfloat16), policy=EVERY_SECOND, level=level, reports=(reports := []))
    assert max(replay_errors(patched, name)) < 1e-6 and not all(decisions(reports[0]))


# a decision for each range -------------------------------------------------------------------------------------------
class ByHand:
    """Temporal Delta Cache over single blocks of a model with one stream, written without the engine; the first `warm` steps and the last are computed."""

    def __init__(self, threshold: float, most: int, skippable: list[int], steps: int):
        self.threshold, self.most, self.skippable, self.steps = threshold, most, skippable, steps
        self.n, self.kept, self.log = -1, {place: [] for place in skippable}, []

    @contextmanager
    def on(self, modules):
        def made(place, original):
            def forward(x, *args, **kwargs):
                kept = self.kept[place]
                if place in self.now:
                    return x + kept[-1][1]
                before = x.clone()
                out = original(x, *args, **kwargs)
                kept.append((self.n, out - before))
                return out
            return forward

        for place in self.skippable:
            modules[place].forward = made(place, modules[place].forward)
        try:
            yield
        finally:
            for place in self.skippable:
                del modules[place].forward

    def step(self):
        self.n += 1
        self.now = set()
        for place, kept in self.kept.items():
            if len(kept) > 1 and self.n < self.steps - 1:
                (m, before), (last, newest) = kept[-2:]
                change = ((newest - before).abs().mean() / newest.abs().mean()).item() / (last - m)
                if (self.n - last) * change < self.threshold and self.n - last <= self.most:
                    self.now.add(place)
        self.log.append(frozenset(self.now))


@pytest.mark.parametrize(("threshold", "most"), [(0.05, 2), (0.06, 3), (0.07, 2), (0.12, 2), (0.04, 1)])
def test_temporal_delta_decides_for_each_range_as_one_written_by_hand_does(threshold, most, monkeypatch):
    name, steps = "z_image", 12
    hand = ByHand(threshold, most, [0, 1, 3], steps)

    def euler(denoise, x, sigmas):
        for now, following in zip(sigmas, sigmas[1:], strict=False):
            hand.step()
            x = x + (following - now) * (x - denoise(x, now)) / now
        return x

    with hand.on(blocks(name)):
        wanted = sample_by(euler, model(name), name, cfg=1.0)
    seen, finish = [], EachRange.finish
    monkeypatch.setattr(EachRange, "finish", lambda self: seen.append(frozenset(first for first, _ in self.allowed)) or finish(self))
    latent, report = run(model(name), name, cfg=1.0, cached={
        "policy": "temporal delta", "policy_knobs": {"threshold": threshold, "max_skips": most}, "level": "block ranges",
        "level_knobs": {"ranges": "0, 1, 3"}, "max_consecutive_skips": 50})
    assert seen == hand.log and relative(latent, wanted) < 1e-5
    assert any(0 < len(now) < 3 for now in seen), "all ranges went the same way, so the test would prove nothing"
    share = [1 - len(now) / (4 + len(always(name))) for now in seen]
    assert [e.share for e in report.each] == pytest.approx(share) and [e.computed for e in report.each] == [not now for now in seen]


@pytest.mark.parametrize("split", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize("name", ["flux", "z_image", "ltxv"])
def test_all_conditions_obey_the_decision_for_a_range(name, split, monkeypatch):
    patched = attached(model(name), policy="temporal delta", policy_knobs={"threshold": 3.0}, level="block ranges",
                       level_knobs={"ranges": "0, 2-"}, reports=(reports := []))
    monkeypatch.setattr(type(patched), "get_free_memory", lambda self, device: 0 if split else 1 << 50)
    with counted(blocks(name)) as calls:
        sample(patched, name)
    (report,) = reports
    skipped = decisions(report).count(False)
    assert skipped >= 4 and all(calls[n] == (2 if split else 1) * (12 - skipped * (n != 1)) for n in range(len(blocks(name))))


def test_what_a_range_is_decided_from_is_counted_and_gone_after_the_run(monkeypatch):
    alive, made = [], EachRange.__init__
    monkeypatch.setattr(EachRange, "__init__", lambda self, policy: alive.append(self) or made(self, policy))
    cached = {"level": "block ranges", "policy_knobs": {"threshold": 3.0}, "policy": "temporal delta"}
    _, report = run(model("flux"), "flux", cached=cached)
    (each,) = alive
    assert each.peak > 0 and not each.kept and not each.allowed
    _, bare = run(model("flux"), "flux", cached={"level": "block ranges", "policy": "interval"})
    assert report.cache_bytes == bare.cache_bytes + each.peak


@pytest.mark.parametrize("level", ["guided output", "model output", "block range", "front or rear range"])
def test_with_one_range_or_none_the_evaluation_is_decided_as_a_whole(level, monkeypatch):
    monkeypatch.setattr(EachRange, "__init__", lambda *args: pytest.fail("no range is there to be asked for"))
    _, report = run(model("flux"), "flux", cached={"level": level, "policy": "temporal delta", "policy_knobs": {"threshold": 3.0}})
    assert not all(decisions(report))
