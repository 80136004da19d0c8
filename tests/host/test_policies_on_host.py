"""The published policies on the host's models: what they see is what is there, and they decide as their authors' loops do."""
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness import STEPS, attached, blocks, decisions, model, plain, relative, run, sample, sample_by, spied

from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.policies.schedule import Schedule
from pack.core.stepcache.signal import signal_of
from testbed import tiny

MODELS = [tiny.OF_FAMILY["flux"][0], tiny.OF_FAMILY["nextdit"][0]]
SECOND = MODELS[1]

# policy: settings that skip something on any model, and settings that skip nothing
LIBERAL_AND_NOTHING = {
    "error control": ({"tolerance": 1.0}, {"tolerance": 0.0}),
    "interval": ({"interval": 3}, {"interval": 1}),
    "first block": ({"threshold": 1.0}, {"threshold": 0.0}),
    "TeaCache": ({"threshold": 10.0, "coefficients": "flux"}, {"threshold": 0.0, "coefficients": "flux"}),
    "EasyCache": ({"threshold": 3.0, "warm_up": 2}, {"threshold": 0.0, "warm_up": 1}),
    "MagCache": ({"threshold": 1.0, "max_skips": 4, "curve": "flux"}, {"threshold": 0.0, "curve": "flux"}),
    "CG-Taylor": ({"gate": 3.0, "warm_up": 3}, {"gate": 0.0, "warm_up": 1}),
    "ZEUS": ({"preset": "FLUX"}, {"preset": "custom", "start": 20, "end": 20}),
    "schedule": ({"preset": "fast"}, {"preset": "custom", "steps": ",".join(["1"] * STEPS)}),
    "temporal delta": ({"threshold": 3.0}, {"threshold": 0.0}),
    "centred interval": ({"interval": 3}, {"interval": 1}),
}


def cached(policy: str, knobs: dict, name: str, **more) -> dict:
    return {"policy": policy, "policy_knobs": knobs, **more}


AS_PUBLISHED = {"level": "guided output", "level_knobs": {"look_back": False}}


def test_every_policy_but_those_of_a_profile_or_a_fixed_list_has_settings_here():
    assert set(POLICIES) - set(LIBERAL_AND_NOTHING) == {"key steps", "profile"}


@pytest.mark.parametrize("policy", LIBERAL_AND_NOTHING)
@pytest.mark.parametrize("name", MODELS)
def test_every_policy_skips_where_it_is_allowed_to_and_nothing_where_it_is_not(name, policy):
    liberal, nothing = LIBERAL_AND_NOTHING[policy]
    latent, report = run(model(name), name, cached=cached(policy, liberal, name))
    assert 0 < decisions(report).count(False) < STEPS - 1 and torch.isfinite(latent).all() and not report.reason
    latent, report = run(model(name), name, cached=cached(policy, nothing, name))
    assert all(decisions(report)) and not report.reason
    assert torch.equal(latent, plain(name))


@pytest.mark.parametrize("policy", LIBERAL_AND_NOTHING)
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_every_policy_bears_samplers_that_evaluate_twice_keep_a_history_or_add_noise(sampler, policy):
    liberal, _ = LIBERAL_AND_NOTHING[policy]
    latent, report = run(model(MODELS[0]), MODELS[0], sampler=sampler, cached=cached(policy, liberal, MODELS[0]))
    assert torch.isfinite(latent).all() and not all(decisions(report))
    assert decisions(report)[0] and decisions(report)[-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if signal_of(policy)])
def test_what_a_policy_watches_is_counted_and_gone_after_the_run(policy, name):
    patched = attached(model(name), reports=(reports := []), **cached(policy, LIBERAL_AND_NOTHING[policy][0], name))
    runs = []
    looked = spied(patched, WrappersMP.APPLY_MODEL, lambda executor, args, kwargs: runs.append(args[5]["reprise.run"]))
    sample(looked, name)
    watch = runs[0].cache.watch
    assert watch.peak > 0 and reports[0].cache_bytes >= runs[0].cache.store.peak + watch.peak
    assert watch.before is watch.now is watch.output is None and not watch.computed and not watch.moves and not watch.known


# what is seen -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Seeing:
    """A test policy that writes down what it sees, and skips some evaluations."""

    name = "seeing"
    signal: str = ""
    ask: object = None
    skipped: tuple = ()
    seen: dict = field(default_factory=dict, compare=False)

    @property
    def needs_forward(self) -> bool:
        return self.signal in ("first block", "modulated input")

    def skip(self, view) -> bool:
        self.seen[view.step.evaluation] = self.ask(view.signal)
        return view.step.evaluation in self.skipped


def change(a, b) -> float:
    return ((a - b).abs().mean() / b.abs().mean()).item()


@contextmanager
def modulated_inputs(name):
    """What the first block's attention is given; for Z-Image what TeaCache takes instead, the time embedding."""
    seen: list = []
    first = blocks(name)[0]
    if hasattr(first, "img_attn"):
        hook = first.img_attn.qkv.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    else:
        hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[3].clone()))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("name", MODELS)
def test_the_modulated_input_is_what_the_first_block_s_attention_gets(name):
    policy = Seeing("modulated input", lambda signal: (signal.drift, signal.changes), skipped=(3, 4, 6, 9, 10))
    with modulated_inputs(name) as seen:
        _, report = run(model(name), name, cfg=1.0, cached={"policy": policy})
    assert [n for n, computed in enumerate(decisions(report)) if not computed] == list(policy.skipped) and len(seen) == STEPS
    assert len(policy.seen) == STEPS - 2, "the first and the last step are not asked about"
    for n, (drift, changes) in policy.seen.items():
        last = max(m for m in range(n) if decisions(report)[m])
        assert drift == pytest.approx(change(seen[n], seen[last]), rel=1e-4) and drift > 1e-3
        assert changes == pytest.approx([change(seen[m], seen[m - 1]) for m in range(last + 1, n + 1)], rel=1e-4)


@pytest.mark.parametrize("level", ["guided output", "model output"])
@pytest.mark.parametrize("name", MODELS)
def test_input_and_output_are_those_of_the_level_in_velocity_form(name, level):
    policy = Seeing("model input", lambda signal: (signal.drift, signal.flow, signal.output_change))
    results = []

    def look(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        results.append((args[0].clone(), float(args[1].flatten()[0]), result.clone()))
        return result

    patched = attached(model(name), policy, level=level)
    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE if level == "guided output" else WrappersMP.APPLY_MODEL, "test.look", look)
    sample(patched, name)
    x = [a[:1] for a, *_ in results]
    v = [((a - out) / sigma)[:1] for a, sigma, out in results]
    assert len(results) == STEPS and len(policy.seen) == STEPS - 2
    for n, (drift, flow, output_change) in policy.seen.items():
        assert drift == pytest.approx(change(x[n], x[n - 1]), rel=1e-3) and flow.travel == pytest.approx((x[n] - x[n - 1]).abs().mean().item(), rel=1e-3)
        assert flow.output_norm == pytest.approx(v[n - 1].abs().mean().item(), rel=1e-3)
        if n > 1:
            moved = (v[n - 1] - v[n - 2]).abs().mean().item()
            assert flow.rate == pytest.approx(moved / (x[n - 1] - x[n - 2]).abs().mean().item(), rel=1e-3)
            assert output_change == pytest.approx(moved / v[n - 1].abs().mean().item(), rel=1e-3)


def test_the_forecast_of_the_first_block_is_that_of_its_residual():
    name, policy = MODELS[0], Seeing("first block", lambda signal: signal.forecast_error(1), skipped=(4, 6, 7))
    seen: list = []
    inputs = []
    first = blocks(name)[0]
    hooks = [first.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs["img"].clone()), with_kwargs=True),
             first.register_forward_hook(lambda module, args, out: seen.append(out[0] - inputs[-1]))]
    try:
        _, report = run(model(name), name, cfg=1.0, cached={"policy": policy, "level": "block range"})
    finally:
        for hook in hooks:
            hook.remove()
    for n, error in policy.seen.items():
        *_, earlier, last = [None, *(m for m in range(n) if decisions(report)[m])]
        slope = 0 if earlier is None else (seen[last] - seen[earlier]) / (last - earlier)
        assert error == pytest.approx(change(seen[last] + slope * (n - last), seen[n]), rel=1e-3)
    assert [n for n, computed in enumerate(decisions(report)) if not computed] == [4, 6, 7]


# how they decide --------------------------------------------------------------------------------------------------------

def easycache_euler(threshold: float, warm_up: int, computed: list):
    """Euler with EasyCache's loop, written from its description; the last velocity stands in on a skip."""
    def sampler(denoise, x, sigmas):
        k = previous = velocity = at_velocity = None
        accumulated = 0.0
        for n, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            skip = False
            if n >= warm_up and n < len(sigmas) - 2 and k is not None:
                accumulated += k * (x - previous).abs().mean() / velocity.abs().mean()
                skip = bool(accumulated < threshold)
            previous = x
            if not skip:
                fresh, accumulated = (x - denoise(x, now)) / now, 0.0
                if velocity is not None:
                    k = (fresh - velocity).abs().mean() / (x - at_velocity).abs().mean()
                velocity, at_velocity = fresh, x
                computed.append(n)
            x = x + (following - now) * velocity
        return x
    return sampler


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("name", MODELS)
def test_easycache_reproduces_an_independent_loop_step_for_step(name, threshold):
    computed: list = []
    wanted = sample_by(easycache_euler(threshold, 3, computed), model(name), name)
    knobs = {"threshold": threshold, "warm_up": 3}
    latent, report = run(model(name), name, cached={"policy": "EasyCache", "policy_knobs": knobs, **AS_PUBLISHED, "max_consecutive_skips": 50})
    assert [n for n, was in enumerate(decisions(report)) if was] == computed
    assert relative(latent, wanted) < 1e-5
    assert threshold == 0.05 or len(computed) < STEPS, "else nothing was decided"


@pytest.mark.parametrize("name", MODELS)
def test_teacache_accumulates_what_the_first_block_gets_as_the_published_loop_does(name):
    """Decisions only, from one and the same run: what the first block gets on it, computed or skipped."""
    knobs = {"threshold": 0.6, "coefficients": "flux"}
    with modulated_inputs(name) as seen:
        _, report = run(model(name), name, cfg=1.0, cached=cached("TeaCache", knobs, name, max_consecutive_skips=50))
    accumulated, wanted = 0.0, []
    for n in range(STEPS):
        if 0 < n < STEPS - 1:
            c = change(seen[n], seen[n - 1])
            accumulated += abs(498.651651 * c ** 4 - 283.781631 * c ** 3 + 55.8554382 * c ** 2 - 3.82021401 * c + 0.264230861)
        compute = n in (0, STEPS - 1) or accumulated >= 0.6
        accumulated = 0.0 if compute else accumulated
        wanted.append(compute)
    assert decisions(report) == wanted and 2 < sum(wanted) < STEPS - 1


def temporal_euler(threshold: float, most: int, computed: list):
    def sampler(denoise, x, sigmas):
        kept: list = []         # (n, velocity)
        for n, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            skip = False
            if len(kept) > 1 and n < len(sigmas) - 2:
                (m, before), (last, newest) = kept[-2:]
                rate = (newest - before).abs().mean() / newest.abs().mean() / (last - m)
                skip = bool((n - last) * rate < threshold) and n - last <= most
            if not skip:
                kept.append((n, (x - denoise(x, now)) / now))
                computed.append(n)
            x = x + (following - now) * kept[-1][1]
        return x
    return sampler


@pytest.mark.parametrize(("threshold", "most"), [(0.1, 2), (0.3, 2), (1.0, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_temporal_delta_reproduces_an_independent_loop_step_for_step(name, threshold, most):
    computed: list = []
    wanted = sample_by(temporal_euler(threshold, most, computed), model(name), name)
    latent, report = run(model(name), name, cached={
        "policy": "temporal delta", "policy_knobs": {"threshold": threshold, "max_skips": most}, **AS_PUBLISHED})
    assert [n for n, was in enumerate(decisions(report)) if was] == computed and relative(latent, wanted) < 1e-5
    assert threshold < 1 or len(computed) < STEPS / 2


@pytest.mark.parametrize("level", ["guided output", "model output", "block range"])
def test_a_schedule_is_followed_at_every_level(level):
    wanted = [True, True, False, True, False, False, True, False, True, True, False, True]
    policy = Schedule.of([n for n, computed in enumerate(wanted) if computed], STEPS)
    _, report = run(model(SECOND), SECOND, cached={"policy": policy, "level": level})
    assert decisions(report) == wanted


def test_a_policy_without_what_it_needs_computes_everything_and_the_report_says_why():
    for policy, knobs, why in (
            ("TeaCache", {}, "have no published coefficients|cannot be told apart"), ("MagCache", {}, "models of family nextdit have no published curve"),
            ("schedule", {"preset": "custom", "steps": "1,0,1"}, "the schedule is one of 3 steps and the run has 12")):
        latent, report = run(model(SECOND), SECOND, cached=cached(policy, knobs, SECOND))
        assert any(part in report.reason for part in why.split("|")) and report.reason.endswith("so everything is computed")
        assert all(decisions(report)) and torch.equal(latent, plain(SECOND))


def test_easycache_inside_the_model_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="'EasyCache' must see the model's input and output, and level 'block range' works inside the model; choose"):
        attached(model(SECOND), policy="EasyCache", level="block range")
