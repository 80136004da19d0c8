"""Image templates: what the one pass captures, against FLUX.2 written out in plain torch over the same weights."""
import math

import pytest
import torch
from harness import sample
from template_files import BLOCKS, DOUBLES, SINGLES, WIDTH, base, image_weights, network_weights, template
from test_templates import STEPS, both, concatenating, sampled
from torch.nn import functional as F

from pack.core.reference.bank import Bank
from pack.core.reference.injector import attach_references
from pack.core.reference.templates.merge import referred
from testbed import tiny

SIZES = [(4, 6), (2, 3)]
HEADS = WIDTH // 128


def text(seed: int = 11, tokens: int = 7) -> torch.Tensor:
    return tiny.conditioning("flux2", seed, tokens)[0][0]


def latents(count: int = 1, seed: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 128, *SIZES[i], generator=generator) for i in range(count)]


def turned(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rotary position code: 4 axes of 32 channels, theta 2000, on pairs of neighbours. x: [1, H, N, 128]; ids: [N, 4]."""
    omega = 2000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    angle = (ids.double()[:, :, None] * omega).flatten(1)
    even, odd = x[..., 0::2].double(), x[..., 1::2].double()
    return torch.stack([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1).flatten(-2).float()


def by_hand(w: dict, prompt: torch.Tensor, references: list) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """K, rotated, and V of all tokens at every block of FLUX.2 at t = 0, of text padded to 512 in front and references at t = 10, 20, ..."""
    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def rms(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps) * w[f"{name}.weight"]

    def modulated(x, shift, scale):
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    def gated(x):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b

    def heads(x):
        return x.unflatten(-1, (HEADS, 128)).transpose(1, 2)

    def attend(q, k, v):
        return (((q @ k.transpose(-1, -2)) / math.sqrt(128)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    padded = F.pad(prompt, (0, 0, 512 - prompt.shape[1], 0))
    ids = [torch.stack([torch.zeros(512)] * 3 + [torch.arange(512.0)], -1)]
    for i, reference in enumerate(references):
        rows, columns = reference.shape[-2:]
        grid = torch.zeros(rows, columns, 4)
        grid[..., 0], grid[..., 1], grid[..., 2] = 10 * (i + 1), torch.arange(rows)[:, None], torch.arange(columns)
        ids.append(grid.view(-1, 4))
    ids = torch.cat(ids)
    txt = linear(padded, "txt_in")
    img = linear(torch.cat([reference.flatten(2).transpose(1, 2) for reference in references], 1), "img_in")
    zero = torch.cat([torch.ones(1, 128), torch.zeros(1, 128)], -1)        # sines and cosines of t = 0
    vec = F.silu(linear(F.silu(linear(zero, "time_in.in_layer")), "time_in.out_layer"))[:, None]
    mods = {side: linear(vec, f"double_stream_modulation_{side}.lin").chunk(6, -1) for side in ("img", "txt")}
    shift, scale, gate = linear(vec, "single_stream_modulation.lin").chunk(3, -1)
    captured = {}
    for i in range(DOUBLES):
        parts = []
        for side, x in (("txt", txt), ("img", img)):
            name = f"double_blocks.{i}.{side}_attn"
            q, k, v = map(heads, linear(modulated(x, *mods[side][:2]), f"{name}.qkv").chunk(3, -1))
            parts.append((rms(q, f"{name}.norm.query_norm"), rms(k, f"{name}.norm.key_norm"), v))
        q, k, v = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        q, k = turned(q, ids), turned(k, ids)
        captured[f"double.{i}"] = (k, v)
        out = dict(zip(("txt", "img"), attend(q, k, v).split([512, img.shape[1]], 1), strict=True))
        streams = {}
        for side, x in (("txt", txt), ("img", img)):
            _, _, gate1, shift2, scale2, gate2 = mods[side]
            x = x + gate1 * linear(out[side], f"double_blocks.{i}.{side}_attn.proj")
            mlp = f"double_blocks.{i}.{side}_mlp"
            streams[side] = x + gate2 * linear(gated(linear(modulated(x, shift2, scale2), f"{mlp}.0")), f"{mlp}.2")
        txt, img = streams["txt"], streams["img"]
    x = torch.cat([txt, img], 1)
    for i in range(SINGLES):
        name = f"single_blocks.{i}"
        y = linear(modulated(x, shift, scale), f"{name}.linear1")
        q, k, v = map(heads, y[..., :3 * WIDTH].chunk(3, -1))
        q, k = turned(rms(q, f"{name}.norm.query_norm"), ids), turned(rms(k, f"{name}.norm.key_norm"), ids)
        captured[f"single.{i}"] = (k, v)
        x = x + gate * linear(torch.cat([attend(q, k, v), gated(y[..., 3 * WIDTH:])], -1), f"{name}.linear2")
    return captured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("templates")


@pytest.fixture(scope="module")
def edit(folder):
    return template(folder, image_weights(), "edit")


def made(edit, prompt, pictures, **more):
    with torch.inference_mode():
        return edit.entry(prompt, pictures, **{"bank": Bank(), **more})


@pytest.mark.parametrize("count", [1, 2])
def test_the_one_pass_captures_what_every_block_attends_to(edit, count):
    entry = made(edit, text(), latents(count))
    wanted = by_hand(network_weights(21), text(), latents(count))
    assert set(entry.blocks) == set(wanted) == {block.replace("_", ".") for block in BLOCKS}
    assert entry.rope == "post" and entry.tokens == 512 + sum(h * w for h, w in SIZES[:count])
    for block, pair in entry.blocks.items():
        for tensor, right in zip(pair, wanted[block], strict=True):
            assert tensor.device.type == "cpu" and right.abs().max() > 0.5
            torch.testing.assert_close(tensor, right, atol=2e-5, rtol=1e-5)


def test_what_an_image_template_injects_equals_a_concatenation_behind_the_rotation_to_the_bit(edit):
    model = base()
    entry, null = made(edit, text(), latents()), made(edit, text(12), latents())
    got = sampled(attach_references(model), **both(referred(entry, null)))
    assert torch.equal(got, sampled(concatenating(model, {0: [entry], 1: [null]})))
    assert (got - sampled(model)).abs().max() > 1e-2


def test_its_bytes_are_told_before_it_is_made_and_every_block_ticks(edit):
    order = []
    entry = made(edit, text(), latents(2), tell=order.append, tick=lambda: order.append("block"))
    assert order == [entry.bytes] + ["block"] * len(BLOCKS)
    assert entry.bytes == edit.bytes(text(), latents(2)) == len(BLOCKS) * (512 + 24 + 6) * WIDTH * 2 * 4


def test_the_same_pictures_and_prompt_are_run_once_and_another_prompt_or_picture_again(folder):
    bank, ticks = Bank(), []
    edit = template(folder, image_weights(), "edit")
    first = made(edit, text(), latents(), bank=bank, tick=lambda: ticks.append(1))
    assert len(ticks) == len(BLOCKS)
    fresh = template(folder, image_weights(), "edit")
    assert made(fresh, text(), latents(), bank=bank).blocks is first.blocks and "patcher" not in vars(fresh)      # nor are the weights loaded
    for prompt, pictures in ((text(12), latents()), (text(), latents(seed=5)), (text(), latents(2))):
        ticks.clear()
        assert made(edit, prompt, pictures, bank=bank, tick=lambda: ticks.append(1)).key.differing(first.key) == ["inputs"]
        assert len(ticks) == len(BLOCKS)
    assert len(bank) == 4


def test_an_interrupted_pass_leaves_nothing_in_the_bank_and_the_next_one_is_whole(edit):
    bank, count = Bank(), []

    def stop():
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(edit, text(), latents(), bank=bank, tick=stop)
    assert not len(bank) and not edit.patcher.model_options["transformer_options"]
    whole = made(edit, text(), latents(), bank=bank)
    assert len(whole.blocks) == len(BLOCKS)


def test_an_image_template_in_fp8_differs_a_little_and_has_a_key_of_its_own(folder, edit):
    small = template(folder, image_weights(), "edit", weights="fp8_e4m3fn")
    rough, fine = made(small, text(), latents()), made(edit, text(), latents())
    assert small.patcher.model_dtype() == torch.float8_e4m3fn and rough.key.differing(fine.key) == ["numerics"]
    error = (rough.blocks["double.0"][1].float() - fine.blocks["double.0"][1]).norm() / fine.blocks["double.0"][1].norm()
    assert 1e-3 < error < 0.2


def test_weights_behind_the_last_block_may_be_there_or_not(folder, edit):
    more = {**image_weights(), "norm_out.linear.weight": torch.randn(2 * WIDTH, WIDTH), "proj_out.weight": torch.randn(128, WIDTH)}
    whole, bare = made(template(folder, more, "with"), text(), latents()), made(edit, text(), latents())
    assert all(torch.equal(a, b) for block in whole.blocks for a, b in zip(whole.blocks[block], bare.blocks[block], strict=True))


def test_the_host_s_own_sampling_of_the_template_s_weights_is_left_as_it_was(edit):
    before = sample(edit.patcher, "flux2", steps=STEPS, size=(4, 6))
    made(edit, text(), latents())
    assert torch.isfinite(before).all() and torch.equal(before, sample(edit.patcher, "flux2", steps=STEPS, size=(4, 6)))


@pytest.mark.parametrize(("pictures", "said"), [
    ([], "wants a picture; connect an image and FLUX.2's VAE"), ([torch.zeros(1, 16, 4, 4)], "the latent has 16 channels and 128 were expected"),
    ([torch.zeros(1, 128, 1, 4, 4)], "encode the picture with FLUX.2's VAE")])
def test_pictures_that_it_cannot_read_are_told(edit, pictures, said):
    with pytest.raises(ValueError, match=said):
        made(edit, text(), pictures)
