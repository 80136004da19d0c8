"""What the contracts of the model families share: a model of every class, and what is looked at in it."""
from functools import cache

import torch
from harness import Control, counted, family, model, network, relative, sample, sample_by, schedule

from pack.core.families.base import module_at
from testbed import tiny

STEPS = 9       # the fewest that are not left alone
FIRSTS = [names[0] for family, names in tiny.OF_FAMILY.items() if family != "unet"]     # for UNets see test_unet.py
EVERY = [name for family, names in tiny.OF_FAMILY.items() if family != "unet" for name in names]
# What runs between the blocks, and after which of them.
BETWEEN = {
    "wan_vace": ("vace_blocks", (0, 2, 4)), "wan_s2v": ("audio_injector.injector", (0, 2, 4)), "wan_dancer": ("music_injector.injector", (0, 3)),
    "wan_animate": ("face_adapter.fuser_blocks", (0, 5)),
}
REPLACEABLE = ["flux", "chroma", "qwen_image", "sd3", "aura", "wan", "wan_vace", "hunyuan_video", "ltxv", "ltxav"]
CONTROLLED = ["flux", "chroma", "qwen_image", "sd3", "hunyuan_video"]


@cache
def host(name: str) -> torch.Tensor:
    return sample(model(name), name, steps=STEPS)


def between(name: str) -> list:
    path, _ = BETWEEN.get(name, ("", ()))
    return list(module_at(network(model(name)), path)) if path else []


def replayed(patched, name: str, modules=(), **sampling) -> tuple[list[float], list[set]]:
    """Every place of the schedule evaluated twice: how the second result differs from the first, and which modules it ran."""
    errors, ran, first = [], [], []

    def twice(denoise, x, sigmas):
        for now, following in zip(sigmas, sigmas[1:], strict=False):
            first.append(denoise(x, now).clone())
            calls.clear()
            errors.append(relative(denoise(x, now), first[-1]))
            ran.append(set(calls))
            x = first[-1] + (x - first[-1]) * following / now
        return x

    with counted(list(modules)) as calls:
        latent = sample_by(twice, patched, name, sigmas=schedule(name, STEPS, patched), **sampling)
    assert torch.isfinite(latent).all() and len(errors) == STEPS
    assert max(relative(b, a) for a, b in zip(first, first[1:], strict=False)) > 1e-2, "the model stands still; the test would prove nothing"
    return errors, ran


def layout(name: str) -> torch.Size:
    """Of the image tokens as the first block gets them."""
    seen: list = []
    stack, block = family(name).blocks(network(model(name)))[0]
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(stack.taken(args, kwargs)[stack.stream].shape), with_kwargs=True)
    try:
        sample(model(name), name, steps=1, cfg=1.0)
    finally:
        hook.remove()
    return seen[0]


def controlled(name: str) -> tuple[dict, torch.Tensor]:
    """Prompts with a ControlNet that adds to every block, and the host's latent of them."""
    _, tokens, width = layout(name)
    stacks = [stack for stack, _ in family(name).blocks(network(model(name)))]
    singles = sum("single" in stack.attribute or "joint" in stack.attribute for stack in stacks)
    control = {"control": Control(len(stacks) - singles, singles, tokens, width), "control_apply_to_uncond": False}
    prompts = {"positive": tiny.conditioning(name, 11, **control), "negative": tiny.conditioning(name, 12, **control)}
    wanted = sample(model(name), name, steps=STEPS, **prompts)
    assert relative(wanted, host(name)) > 0.03, "the control does too little to be missed"
    return prompts, wanted
