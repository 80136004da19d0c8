"""UNets: ControlNet and the patches of others, on both kinds of step."""
import logging

import comfy.controlnet
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from harness import (
    EVERY_SECOND,
    STEPS,
    Never,
    attached,
    decisions,
    model,
    relative,
    replay_errors,
    run,
    sample,
    sample_by,
)
from unets import BLOCKS, CASES, FEW, IDS, PICTURES, UNET_LEVELS, kept

from testbed import tiny


class Control(comfy.controlnet.ControlBase):
    """Fixed random residuals, with gaps, for every list that a ControlNet or a T2I adapter fills."""

    def __init__(self, lists=("input", "middle", "output"), factor=lambda call: {}):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = [(32, 8)] * 3 + [(32, 4)] + [(64, 4)] * 2 + [(64, 2)] + [(128, 2)] * 2
        made = [0.5 * torch.randn(1, width, size, size, generator=generator) for width, size in shapes]
        own = lambda: [None if n in (2, 5) else r.roll(n, 2) for n, r in enumerate(made)]
        # the host takes input residuals from the end, first block first, and output residuals from the end, last block's skip first
        self.residuals = {"input": own()[::-1], "middle": [made[-1].roll(1, 1)], "output": own()}
        self.residuals = {key: value if key in lists else [] for key, value in self.residuals.items()}
        self.calls, self.factor = 0, factor

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        factor = self.factor(self.calls)
        self.calls += 1
        scaled = lambda key, n, r: None if r is None else r.repeat(len(x_noisy), 1, 1, 1) * factor.get((key, n), factor.get(key, 1.0))
        return {key: [scaled(key, n, r) for n, r in enumerate(entries)] for key, entries in self.residuals.items()}

    def copy(self):
        return self


def controlled(name: str, control: Control) -> dict:
    both = {"control": control, "control_apply_to_uncond": False}
    return {"positive": tiny.conditioning(name, 11, **both), "negative": tiny.conditioning(name, 12, **both)}


@pytest.mark.parametrize(("name", "level", "knobs", "lists"), [
    *(("sd15_like", *case, ("input", "middle", "output")) for case in CASES), *(("sdxl_like", *case, ("middle", "output")) for case in FEW),
    *(("sd15_like", *case, ("input",)) for case in FEW)], ids=str)
def test_controlnet_is_neither_lost_nor_added_twice_on_a_skip(name, level, knobs, lists, caplog):
    conditions = controlled(name, Control(lists))
    host = sample(model(name), name, cfg=1.0, **conditions)
    assert relative(host, sample(model(name), name, cfg=1.0)) > 0.02, "the control does too little to be missed"
    exact, _ = run(model(name), name, cfg=1.0, cached={"policy": Never(), "level": level, "level_knobs": knobs}, **conditions)
    assert torch.equal(exact, host)
    with caplog.at_level(logging.WARNING):
        patched = attached(model(name), policy=EVERY_SECOND, level=level, level_knobs=knobs)
        assert max(replay_errors(patched, name, **conditions)) < 1e-6
    assert "control could not be applied" not in caplog.text


def doubled_on(odd: bool, **keys) -> Control:
    return Control(factor=lambda call: {key if n is None else (key, n): 2.0 for key, numbers in keys.items() for n in numbers} if call % 2 or not odd else {})


@pytest.mark.parametrize("branch", [0, 1, 4])
def test_residuals_of_shallow_blocks_are_those_of_now_and_those_of_deep_ones_those_that_are_kept(branch):
    """Output residual n goes to the skip connection of input block n: shallow below the branch."""
    name, patched = "sd15_like", attached(model("sd15_like"), policy=EVERY_SECOND, level="unet depth", level_knobs={"branch": branch})
    shallow, deep = tuple(range(branch + 1)), tuple(range(branch + 1, BLOCKS))

    def seconds(patcher, control):
        seen: list = []

        def twice(denoise, x, sigmas):
            for now, following in zip(sigmas, sigmas[1:], strict=False):
                first = denoise(x, now).clone()
                seen.append(denoise(x, now).clone())
                x = first + (x - first) * following / now
            return x

        sample_by(twice, patcher, name, cfg=1.0, **controlled(name, control))
        return torch.stack(seen[:-1])

    changed = seconds(patched, doubled_on(True, output=shallow))
    assert relative(changed, seconds(model(name), doubled_on(True, output=shallow))) < 1e-6
    assert relative(changed, seconds(model(name), Control())) > 1e-4
    unchanged = seconds(patched, doubled_on(True, output=deep, middle=(None,)))
    assert relative(unchanged, seconds(model(name), Control())) < 1e-6


# patches of others ---------------------------------------------------------------------------------------------------
def watched(name: str, seen: list):
    """Patches of every kind that note where they fire."""
    def look(kind, streams):
        def patch(*arguments):
            seen.append((kind, arguments[-1]["block"]))
            return arguments[0] if streams == 1 else arguments[:2]
        return patch

    patched = model(name).clone()
    patched.set_model_input_block_patch(look("input_block_patch", 1))
    patched.set_model_input_block_patch_after_skip(look("input_block_patch_after_skip", 1))
    patched.set_model_output_block_patch(look("output_block_patch", 2))
    return patched


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_patches_of_others_fire_where_their_block_runs_and_nowhere_else(level, knobs):
    seen: list = []
    per_call = []
    patched = attached(watched("sd15_like", seen), level=level, level_knobs=knobs, reports=(reports := []))

    def callback(step, denoised, x, total):
        per_call.append(list(seen))
        seen.clear()

    sample(patched, "sd15_like", cfg=1.0, callback=callback)
    ways = [("input", n) for n in range(BLOCKS)] + [("middle", 0)] + [("output", n) for n in range(BLOCKS)]

    def wanted(places):
        inputs = [(kind, ways[n]) for n in places if n < BLOCKS for kind in ("input_block_patch", "input_block_patch_after_skip")]
        return inputs + [("output_block_patch", ways[n]) for n in places if n > BLOCKS]

    assert per_call == [wanted(range(2 * BLOCKS + 1)) if computed else wanted(sorted(kept(level, knobs))) for computed in decisions(reports[0])]
    assert decisions(reports[0]).count(False) == 4


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
@pytest.mark.parametrize("name", PICTURES[:1])
def test_freeu_acts_once_on_both_kinds_of_step(name, level, knobs):
    """It writes into h and gives another skip connection."""
    patched = FreeU_V2.execute(model(name), 1.3, 1.4, 0.9, 0.2).result[0]
    host = sample(patched, name, cfg=1.0)
    assert relative(host, sample(model(name), name, cfg=1.0)) > 5e-3
    assert torch.equal(run(patched, name, cfg=1.0, cached={"policy": Never(), "level": level, "level_knobs": knobs})[0], host)
    assert max(replay_errors(attached(patched, policy=EVERY_SECOND, level=level, level_knobs=knobs), name, cfg=1.0)) < 1e-6


@pytest.mark.parametrize(("end", "after_skip"), [(1.0, False), (0.4, True)])
@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_a_downscaled_middle_is_kept_and_put_back_downscaled(level, knobs, end, after_skip):
    patched = PatchModelAddDownscale.execute(model("sd15_like"), 3, 2.0, 0.0, end, after_skip, "bicubic", "bicubic").result[0]
    sampling = {"size": 16, "cfg": 1.0}
    assert relative(sample(patched, "sd15_like", **sampling), sample(model("sd15_like"), "sd15_like", **sampling)) > 1e-3
    assert max(replay_errors(attached(patched, policy=EVERY_SECOND, level=level, level_knobs=knobs), "sd15_like", **sampling)) < 1e-6
    latent, report = run(patched, "sd15_like", **sampling, cached={
        "level": level, "level_knobs": knobs, "policy_knobs": {"interval": 4, "warm_up": 1}})
    assert torch.isfinite(latent).all() and not all(decisions(report))


@pytest.mark.parametrize(("level", "knobs"), CASES, ids=IDS)
def test_attention_has_the_same_number_on_both_kinds_of_step(level, knobs):
    numbers: dict = {}

    def look(q, context, value, extra):
        numbers.setdefault(extra["block"], set()).add(extra["transformer_index"])
        return q, context, value

    patched = model("sd15_like").clone()
    patched.set_model_attn1_patch(look)
    sample(attached(patched, level=level, level_knobs=knobs), "sd15_like", cfg=1.0)
    assert len(numbers) >= 10 and all(len(seen) == 1 for seen in numbers.values())


@pytest.mark.parametrize("level", UNET_LEVELS)
def test_a_patch_that_counts_its_blocks_makes_the_level_compute_and_say_so(level):
    patched = model("sd15_like").clone()
    patched.set_model_patch(lambda parts: {"h": parts["h"] * 1.1}, "middle_block_after_patch")
    host = sample(patched, "sd15_like")
    latent, report = run(patched, "sd15_like", cached={"level": level})
    assert torch.equal(latent, host) and all(decisions(report)) and report.evaluations == STEPS
    assert "behind the middle block" in report.reason


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("level", UNET_LEVELS)
def test_a_network_that_does_not_ask_for_the_kept_feature_is_computed_and_that_is_said(level, late):
    """A wrapper below ours that drops all patches."""
    calls: list = []

    def bare(executor, *args, **kwargs):
        calls.append(1)
        if late and len(calls) < 4:
            return executor(*args, **kwargs)
        return executor(*args[:5], {**args[5], "patches": {}}, **kwargs)

    patched = attached(model("sd15_like"), level=level, reports=(reports := []))
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test.bare", bare)
    latent = sample(patched, "sd15_like", cfg=1.0)
    assert torch.equal(latent, sample(model("sd15_like"), "sd15_like", cfg=1.0))
    assert all(decisions(reports[0])) and reports[0].evaluations == STEPS and "did not pass its output blocks" in reports[0].reason
