"""The seeded models themselves: fit to prove something on, and opened by the stock loader."""
import time

import comfy.sd
import pytest
import torch
from harness import STEPS, assert_moves, family, model, network, packed, relative, sample

from pack.core.families import FAMILIES, family_of
from testbed import tiny


# Cosmos begins at sigma 80, where no model moves.
@pytest.mark.parametrize("name", [name for name in tiny.KINDS if name not in (*tiny.OF_FAMILY["unet"], "flux_13m", "cosmos_predict2")])
def test_outputs_move_from_step_to_step_but_not_wildly(name):
    outputs: list = []
    latent = assert_moves(name, model(name))
    sample(model(name), name, callback=lambda step, denoised, x, total: outputs.append(packed(denoised).clone()))
    assert torch.isfinite(latent).all() and len(outputs) == STEPS
    assert max(relative(b, a) for a, b in zip(outputs, outputs[1:], strict=False)) < 0.25


def test_a_model_that_stands_still_fails_the_precondition_of_numeric_tests():
    still = tiny.patcher("flux")
    with torch.no_grad():
        for p in still.model.diffusion_model.final_layer.parameters():
            p.zero_()
    with pytest.raises(AssertionError, match="does not move"):
        assert_moves("flux", still)


@pytest.mark.parametrize("name", [name for name, kind in tiny.KINDS.items() if kind.stock])
def test_the_stock_loader_opens_the_checkpoint_and_makes_the_same_model(name, tmp_path):
    tiny.write(name, tmp_path / "model.safetensors")
    loaded, wanted = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors")), tiny.patcher(name)
    assert type(loaded.model) is type(wanted.model)
    assert type(loaded.model.diffusion_model) is type(wanted.model.diffusion_model)
    for (key, a), (other, b) in zip(loaded.model.state_dict().items(), wanted.model.state_dict().items(), strict=True):
        assert key == other and torch.equal(a.half(), b.half())


def test_a_seed_is_a_model():
    a, b, c = (tiny.weights("flux", seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a) and not all(torch.equal(a[key], c[key]) for key in a)


def test_every_family_has_a_tiny_model_and_unsupported_ones_have_none():
    assert set(tiny.OF_FAMILY) == set(FAMILIES)
    for kind, names in tiny.OF_FAMILY.items():
        assert all(family_of(model(name).model.diffusion_model) is FAMILIES[kind] for name in names)
    assert all(family_of(model(name).model.diffusion_model) is None for name in tiny.UNSUPPORTED)


@pytest.mark.parametrize("name", tiny.KINDS)
def test_gates_and_modulation_are_alive(name):
    dead = [key for key, p in model(name).model.diffusion_model.named_parameters() if not p.any()]
    assert not dead


@pytest.mark.parametrize("name", [name for names in tiny.OF_FAMILY.values() for name in names])
def test_every_block_moves_its_stream(name):
    """A gate of zero would leave it as it was, and a skip of such blocks would be right whatever it puts there."""
    net, moved = network(model(name)), {}

    def told(place, stream, before, after):
        if before.shape == after.shape and before.numel():
            moved.setdefault((place, stream), []).append(relative(after.float(), before.float()))

    def block(place, stack):
        def before(module, args, kwargs):
            taken[place] = {stream: value.clone() for stream, value in stack.taken(args, kwargs).items() if torch.is_tensor(value)}

        def after(module, args, result):
            given = stack.given(result)
            for stream, value in taken.pop(place).items():
                if torch.is_tensor(given[stream]):      # some last blocks drop the text
                    told(place, stream, value, given[stream])
        return before, after

    taken, hooks, every = {}, [], family(name).blocks(net)
    for place, (stack, module) in enumerate(every):
        before, after = block(place, stack)
        hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    layers = [m for m in net.modules() if type(m).__name__ in ("ResBlock", "VideoResBlock", "SpatialTransformer", "SpatialVideoTransformer")]
    for place, module in enumerate(layers if not every else ()):
        hooks.append(module.register_forward_hook(lambda module, args, out, place=place: told(place, "h", args[0], out)))
    try:
        sample(model(name), name, steps=2, cfg=1.0)
    finally:
        for hook in hooks:
            hook.remove()
    assert len({place for place, _ in moved}) == len(every) or (not every and len(moved) >= len(layers) / 2)
    still = {where: min(how) for where, how in moved.items() if min(how) < 1e-2}
    assert not still


@pytest.mark.parametrize("name", [name for names in tiny.OF_FAMILY.values() for name in names])
def test_time_is_slow(name):
    """The fast frequencies of the first time embedding are left out, the slow ones are there."""
    found = 0
    for key, p in network(model(name)).named_parameters():
        for columns in (columns or p.shape[1] for end, columns in tiny.TIME_IN.items() if key.endswith(end)):
            half = columns // 2
            fast = torch.arange(half) < int(tiny.SLOW * half)
            assert not p[:, :columns][:, fast.repeat(2)].any(), key
            assert p[:, half - 1].any() and p[:, columns - 1].any(), key
            found += 1
    assert found


def test_the_larger_model_is_large_and_is_made_in_a_moment():
    begun = time.monotonic()
    made = tiny.patcher("flux_13m")
    assert time.monotonic() - begun < 10
    assert sum(p.numel() for p in made.model.diffusion_model.parameters()) >= 13_000_000
    assert made.model.diffusion_model.params.hidden_size == 256


def test_a_model_the_stock_loader_cannot_size_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="patcher"):
        tiny.write("qwen_image", tmp_path / "model.safetensors")
