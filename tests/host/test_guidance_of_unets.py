"""UNets: guidance that evaluates a condition once more, with perturbed attention, on a blurred picture, or on any other."""
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from harness import EVERY_SECOND, STEPS, Never, attached, decisions, model, relative, replay_errors, run, sample
from unets import ANY_LEVELS, CASES, PICTURES, PLAIN


def on_another_picture(patched):
    """The positive condition once more, as it is, on another x."""
    def behind_guidance(args):
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"].roll(1, -1), args["sigma"], args["model_options"])
        return args["denoised"] + 0.3 * (args["cond_denoised"] - other)

    clone = patched.clone()
    clone.set_model_sampler_post_cfg_function(behind_guidance)
    return clone


GUIDANCE = {
    "another picture": on_another_picture,
    "perturbed attention": lambda patched: PerturbedAttentionGuidance.execute(patched, 3.0).result[0],
    "self-attention": lambda patched: SelfAttentionGuidance.execute(patched, 1.0, 2.0).result[0],
}
EVERY = [*((level, PLAIN.get(level, {})) for level in ANY_LEVELS), CASES[0], CASES[-1]]


@pytest.mark.parametrize(("level", "knobs"), EVERY, ids=str)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", PICTURES[:1])
def test_guidance_is_the_hosts_where_all_is_computed_and_not_lost_on_skips(name, guidance, level, knobs):
    steered = GUIDANCE[guidance](model(name))
    host = sample(steered, name)
    with_it = relative(host, sample(model(name), name))
    assert with_it > 0.02, "the guidance does too little to be missed"
    cached = {"level": level, "level_knobs": knobs}
    latent, report = run(steered, name, cached={"policy": Never(), **cached})
    assert torch.equal(latent, host) and report.evaluations == STEPS
    reports: list = []
    errors = replay_errors(attached(steered, policy=EVERY_SECOND, reports=reports, **cached), name)
    assert max(errors) < 1e-5 and decisions(reports[0]).count(False) == STEPS - 1
    assert reports[0].level == ("model output" if level == "guided output" else level)
    latent, _ = run(steered, name, cached=cached)
    without, _ = run(model(name), name, cached=cached)
    assert relative(latent, without) == pytest.approx(with_it, rel=0.5)
