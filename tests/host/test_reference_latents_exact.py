"""Reference Latent Cache in mode exact: the host's own forward with a mask in its attention."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from edit_models import both, cached, compared, conditioning, exact, joint, near, network_of, patcher, references, rows_of
from harness import STEPS, sample
from test_easycontrol import turned
from torch.nn import functional as F

from pack.core.reference import injector, latents
from pack.core.reference.bank import Bank
from testbed import tiny


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize(("refs", "sizes"), [((31,), None), ((31, 32), None), ((31, 32), [(4, 10), (7, 5)])])
def test_exact_mode_equals_masked_joint_attention_over_references_at_time_zero(refs, sizes, steps):
    off, unmasked = compared(refs, sizes, steps=steps)
    assert unmasked > 1e-3 and off <= 1e-5


def test_exact_mode_places_references_as_the_host_does_where_positions_are_scaled():
    def scaled(patched):
        clone = patched.clone()
        clone.model_options["transformer_options"]["rope_options"] = {"scale_x": 1.5, "scale_y": 0.5, "shift_x": 1.0, "shift_y": 2.0, "shift_t": 3.0}
        return clone

    off, _ = compared((31, 32), patched=scaled(patcher("flux2")))
    plain, scaled_run = (sample(exact(patched), "flux2", **both("flux2")) for patched in (patcher("flux2"), scaled(patcher("flux2"))))
    assert off <= 1e-5 and not near(plain, scaled_run, 1e-3)


@pytest.mark.parametrize("sampling", [{"batch": 3}, {"cfg": 1.0}, {"sampler": "heun"}, {"size": (6, 10)}], ids=str)
def test_exact_mode_holds_for_batches_without_guidance_and_for_other_samplers_and_shapes(sampling):
    off, unmasked = compared((31, 32), **sampling)
    assert unmasked > 1e-3 and off <= 1e-5


def explicit_flux2(x, sigma, context, refs):
    """One velocity of a FLUX.2, written out: references at t = 0, blind to text and image, all tokens carried through every layer."""
    net = network_of("flux2")
    heads, width, params = net.num_heads, net.hidden_size, net.params
    context = F.pad(context, (0, 0, 512 - context.shape[1], 0))

    def rows(latent):
        return latent.flatten(2).transpose(1, 2)

    def grid(latent, first):
        h, w = latent.shape[-2:]
        ids = torch.zeros(h, w, 4)
        ids[..., 0], ids[..., 1], ids[..., 2] = first, torch.arange(h)[:, None], torch.arange(w)[None]
        return ids.view(-1, 4)

    words = torch.zeros(512, 4)
    words[:, 3] = torch.arange(512)
    ids = torch.cat([words, grid(x, 0), *(grid(ref, 10 * i) for i, ref in enumerate(refs, 1))])
    inner = patcher("flux2").model.process_latent_in
    tokens = [net.txt_in(context), net.img_in(rows(x)), net.img_in(torch.cat([rows(inner(ref)) for ref in refs], 1))]
    sizes = [part.shape[1] for part in tokens]
    blind = torch.zeros(sum(sizes), sum(sizes), dtype=torch.bool)
    blind[sizes[0] + sizes[1]:, :sizes[0] + sizes[1]] = True
    times = [net.time_in(timestep_embedding(torch.tensor([time]), 256)) for time in (sigma, sigma, 0.0)]

    def split(part):
        return part.view(1, -1, heads, width // heads).transpose(1, 2)

    def rms(part, norm):
        return part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-6) * norm.weight

    def norm(part):
        return F.layer_norm(part, (width,), eps=1e-6)

    def gated(part):
        a, b = part.chunk(2, -1)
        return F.silu(a) * b

    def attend(qkv):
        q, k, v = (torch.cat(part, 2) for part in zip(*qkv, strict=True))
        weights = turned(q, ids, params) @ turned(k, ids, params).transpose(-1, -2) / (width // heads) ** 0.5
        return (weights.masked_fill(blind, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2).split(sizes, 1)

    def modulation(module, time, parts):
        return F.linear(F.silu(time), module.lin.weight)[:, None].chunk(parts, -1)

    mods = [modulation(net.double_stream_modulation_txt if i == 0 else net.double_stream_modulation_img, time, 6) for i, time in enumerate(times)]
    for block in net.double_blocks:
        qkv = []
        for i, (h, mod) in enumerate(zip(tokens, mods, strict=True)):
            attn = block.txt_attn if i == 0 else block.img_attn
            q, k, v = map(split, F.linear(norm(h) * (1 + mod[1]) + mod[0], attn.qkv.weight).chunk(3, -1))
            qkv.append((rms(q, attn.norm.query_norm), rms(k, attn.norm.key_norm), v))
        for i, out in enumerate(attend(qkv)):
            attn, mlp = (block.txt_attn, block.txt_mlp) if i == 0 else (block.img_attn, block.img_mlp)
            _, _, gate1, shift2, scale2, gate2 = mods[i]
            h = tokens[i] + gate1 * F.linear(out, attn.proj.weight)
            tokens[i] = h + gate2 * F.linear(gated(F.linear(norm(h) * (1 + scale2) + shift2, mlp[0].weight)), mlp[2].weight)
    for block in net.single_blocks:
        qkv, rest = [], []
        for h, time in zip(tokens, times, strict=True):
            shift, scale, gate = modulation(net.single_stream_modulation, time, 3)
            y = F.linear(norm(h) * (1 + scale) + shift, block.linear1.weight)
            q, k, v = map(split, y[..., :3 * width].chunk(3, -1))
            qkv.append((rms(q, block.norm.query_norm), rms(k, block.norm.key_norm), v))
            rest.append((gated(y[..., 3 * width:]), gate))
        for i, out in enumerate(attend(qkv)):
            mlp, gate = rest[i]
            tokens[i] = tokens[i] + gate * F.linear(torch.cat([out, mlp], -1), block.linear2.weight)
    shift, scale = F.linear(F.silu(times[1]), net.final_layer.adaLN_modulation[1].weight)[:, None].chunk(2, -1)
    out = F.linear(norm(tokens[1]) * (1 + scale) + shift, net.final_layer.linear.weight)
    return out.transpose(1, 2).view(x.shape)


def test_exact_mode_equals_a_forward_that_is_written_out():
    refs, conds, got = references("flux2", 31, 32), conditioning("flux2", 11), {}

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got["x"], got["v"] = x.clone(), (x - denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args)) / sigmas[0]
        return x

    noise = tiny.noise("flux2")
    with torch.inference_mode():
        comfy.sample.sample_custom(exact(patcher("flux2")), noise, 1.0, comfy.samplers.KSAMPLER(sampler), torch.tensor([0.7, 0.0]),
                                   conditioning("flux2", 11, *refs), conditioning("flux2", 12), noise * 0, disable_pbar=True, seed=1)
        wanted = explicit_flux2(got["x"], 0.7, conds[0][0], refs)
        swapped = explicit_flux2(got["x"], 0.7, conds[0][0], refs[::-1])
    assert (wanted - swapped).abs().max() > 1e-3 and near(got["v"], wanted)


def test_exact_mode_serves_regional_conditions_each_with_its_own_references():
    def regions(method=None):
        left = conditioning("flux2", 11, *references("flux2", 31), method=method, area=(8, 4, 0, 0), strength=1.0)
        right = conditioning("flux2", 13, *references("flux2", 32, 33), method=method, area=(8, 4, 0, 4), strength=1.0)
        return {"positive": left + right, "negative": conditioning("flux2", 12, *references("flux2", 34), method=method)}

    got = sample(exact(patcher("flux2")), "flux2", **regions())
    wanted = sample(joint(), "flux2", **regions("index_timestep_zero"))
    assert near(got, wanted)


def test_references_on_one_side_alone_stay_on_that_side():
    refs = references("flux2", 31)
    conds = {"positive": conditioning("flux2", 11, *refs), "negative": conditioning("flux2", 12)}
    zero = {**conds, "positive": conditioning("flux2", 11, *refs, method="index_timestep_zero")}
    assert near(sample(exact(patcher("flux2")), "flux2", **conds), sample(joint(), "flux2", **zero))


def test_a_lora_after_the_node_reaches_the_references():
    refs, bank = references("flux2", 31), Bank()
    first = exact(patcher("flux2"), bank)
    lora = {"diffusion_model.img_in.weight": (0.3 * torch.randn(128, 128, generator=torch.Generator().manual_seed(4)),)}

    def tuned(model):
        clone = model.clone()
        assert clone.add_patches(lora, 0.5)
        return clone

    plain = sample(first, "flux2", **both("flux2", *refs))
    got = sample(tuned(first), "flux2", **both("flux2", *refs))
    wanted = sample(joint(tuned(patcher("flux2"))), "flux2", **both("flux2", *refs, method="index_timestep_zero"))
    assert near(got, wanted) and not near(got, plain, 1e-3) and len(bank) == 2


def test_seeds_prompts_and_both_sides_share_one_entry_and_other_references_have_their_own():
    bank, records = Bank(), []
    patched = exact(patcher("flux2"), bank, records)
    sample(patched, "flux2", **both("flux2"))
    sample(patched, "flux2", seed=5, positive=conditioning("flux2", 21, *references("flux2", 31)), negative=conditioning("flux2", 22), size=(6, 10))
    assert len(bank) == 1 and [len(record.entries.made) for record in records] == [1, 0]
    sample(patched, "flux2", **both("flux2", *references("flux2", 32)))
    assert len(bank) == 2


def test_reference_tokens_pass_no_layer_in_exact_mode_but_for_the_one_encoding():
    lengths = rows_of("flux2", exact(patcher("flux2")))
    assert lengths.pop(0) == 48 and lengths and set(lengths) == {64}


def test_an_interrupted_exact_run_leaves_nothing_and_the_next_one_is_right():
    bank, patched = Bank(), None
    patched = exact(patcher("flux2"), bank)
    before = {key: list(held) for key, held in patched.model_options["transformer_options"].items() if isinstance(held, dict)}
    hits = []

    def stop(*args):
        hits.append(1)
        if len(hits) == 2:
            raise KeyboardInterrupt

    handle = network_of("flux2").single_blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(patched, "flux2", **both("flux2"))
    handle.remove()
    assert injector.RUN not in patched.model_options["transformer_options"] and latents.RUN not in patched.model_options["transformer_options"]
    assert before == {key: list(held) for key, held in patched.model_options["transformer_options"].items() if isinstance(held, dict)}
    assert near(sample(patched, "flux2", **both("flux2")), sample(joint(), "flux2", **both("flux2", method="index_timestep_zero")))


@pytest.mark.parametrize(("name", "refs", "more", "why"), [
    ("flux", None, {}, "trained for it"), ("qwen_image", None, {}, "trained for it"), ("flux2", None, {"method": "uxo/uno"}, "placed by 'uxo'"),
    ("flux2", 2, {}, "2x128x8x6")])
def test_what_exact_mode_cannot_serve_is_the_host_s_own_run_and_says_why(name, refs, more, why):
    records = []
    latent = references(name, 31) if refs is None else [torch.cat(references(name, 31, 32))]
    conds = both(name, *latent, **more)
    got = sample(cached(patcher(name), records, mode="exact"), name, **conds)
    assert torch.equal(got, sample(patcher(name), name, **conds))
    assert why in records[0].line() and "computed in full" in records[0].line()
