"""Reference Latent Cache against the host: its own forward, with a mask in its attention where mode exact promises one."""
import inspect
from functools import cache

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod, FluxKVCache
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from harness import STEPS, Control, attached, model, sample, spied
from test_easycontrol import condition, turned
from torch.nn import functional as F

from pack.core.reference import injector, join, kept, latents
from pack.core.reference.bank import Bank
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.latents import Settings, attach_reference_latents
from pack.core.reference.told import share
from pack.nodes import reference_latents as group
from testbed import tiny
from testbed.kind import Kind
from testbed.zoo import NEXTDIT, ZOO

OMNI = NEXTDIT | {
    "z_image_modulation": True, "dim": 256, "axes_dims": [32, 48, 48], "pad_tokens_multiple": 8, "siglip_feat_dim": 16, "n_refiner_layers": 1, "n_layers": 3}
KINDS = {
    "flux": tiny.KINDS["flux"], "flux_longcat": ZOO["flux_longcat"], "flux2": tiny.KINDS["flux2"], "qwen_image": ZOO["qwen_image"],
    "qwen_2511": Kind(**{**vars(ZOO["qwen_image"]), "config": ZOO["qwen_image"].config | {"default_ref_method": "index_timestep_zero"}}),
    "krea2_edit": Kind(**{**vars(ZOO["krea2"]), "config": ZOO["krea2"].config | {"kvheads": 1, "default_ref_method": "index_timestep_zero"}}),
    "omni": Kind(host="ZImage", config=OMNI, channels=16, text=16),
    "omni_plain": Kind(host="ZImage", config=OMNI | {"siglip_feat_dim": None}, channels=16, text=16),
}
FREEZE = list(KINDS)


@cache
def patcher(name: str):
    tiny.KINDS.setdefault(name, KINDS[name])
    return model(name)


def references(name: str, *seeds: int, size=(8, 6)) -> list:
    kind = KINDS[name]
    shape = (1, kind.channels, *((1,) if kind.frames else ()), *size)
    return [0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def conditioning(name: str, seed: int, *refs, method: str | None = None, **more) -> list:
    """As the host's nodes make it."""
    patcher(name)
    out = tiny.conditioning(name, seed, **more)
    for latent in refs:
        out = ReferenceLatent.execute(out, {"samples": latent}).result[0]
    return out if method is None else FluxKontextMultiReferenceLatentMethod.execute(out, method).result[0]


def both(name: str, *refs, **more) -> dict:
    refs = refs or references(name, 31)
    return {"positive": conditioning(name, 11, *refs, **more), "negative": conditioning(name, 12, *refs, **more)}


def cached(patched, records=None, **settings):
    return attach_reference_latents(patched, Settings(**settings), (records if records is not None else []).append)


def exact(patched, bank=None, records=None):
    """In mode exact, with a bank of the test's own."""
    return cached(attach_references(patched, bank=Bank() if bank is None else bank), records, mode="exact")


def near(a, b, most=1e-5):
    return (a - b).abs().max() <= most


def network_of(name: str):
    return patcher(name).model.diffusion_model


# exact ---------------------------------------------------------------------------------------------------------------
class Masked:
    """An attn1_patch that lets references see references alone; all else is the host's own forward with them in the sequence."""

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None, **others):
        refs = sum(extra_options.get("reference_image_num_tokens", ()))
        tokens = q.shape[2]
        allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        allowed[..., tokens - refs:, :tokens - refs] = False
        return {"attn_mask": allowed}


def joint(patched=None):
    """The reference: a FLUX.2 whose attention is masked. Its conditioning must choose 'index_timestep_zero'."""
    clone = (patched or patcher("flux2")).clone()
    clone.set_model_attn1_patch(Masked())
    return clone


def compared(refs=(31,), sizes=None, patched=None, cfg=3.0, **sampling):
    """The largest difference of a run from the reference, and how far the reference is from the host's plain run."""
    refs = [latent for seed, size in zip(refs, sizes or [(8, 6)] * len(refs), strict=True) for latent in references("flux2", seed, size=size)]
    patched = patched or patcher("flux2")
    zero = both("flux2", *refs, method="index_timestep_zero")
    wanted = sample(joint(patched), "flux2", cfg=cfg, **{**zero, **sampling})
    unmasked = sample(patched, "flux2", cfg=cfg, **{**zero, **sampling})
    got = sample(exact(patched), "flux2", cfg=cfg, **{**both("flux2", *refs), **sampling})
    return (got - wanted).abs().max().item(), (unmasked - wanted).abs().max().item()


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


# freeze --------------------------------------------------------------------------------------------------------------
def stacks(name: str) -> list:
    net = network_of(name)
    return list(next(getattr(net, attribute) for attribute in ("single_blocks", "transformer_blocks", "blocks", "layers") if hasattr(net, attribute)))


def rows_of(name: str, patched, **sampling) -> list[int]:
    """Tokens of image and references that the last block's linear layers see, call by call."""
    texts, lengths, block = {"flux2": 512, "flux": 7, "flux_longcat": 7, "krea2_edit": 7}, [], stacks(name)[-1]
    layer = {"qwen_image": "attn.to_q", "qwen_2511": "attn.to_q", "krea2_edit": "attn.wq", "omni": "feed_forward.w1", "omni_plain": "feed_forward.w1"}.get(name)
    layer = block.get_submodule(layer or "linear1")
    handle = layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    try:
        sample(patched, name, **{**both(name), **sampling})
    finally:
        handle.remove()
    return [length - texts.get(name, 0) if length > texts.get(name, 0) else length for length in lengths]


@pytest.mark.parametrize("settings", [{"first": STEPS}, {"refresh": 1}, {"refresh": 1, "measure": True}], ids=str)
@pytest.mark.parametrize("name", FREEZE)
def test_freezing_nothing_is_bit_identical_to_the_host(name, settings):
    assert torch.equal(sample(cached(patcher(name), **settings), name, **both(name)), sample(patcher(name), name, **both(name)))


@pytest.mark.parametrize("name", FREEZE)
def test_frozen_references_leave_the_sequence_after_the_first_evaluations(name):
    lengths = rows_of(name, cached(patcher(name), first=3), cfg=1.0)
    plain = rows_of(name, patcher(name), cfg=1.0)
    assert len(lengths) == len(plain) == STEPS and lengths[:3] == plain[:3] and len(set(plain)) == 1
    assert len(set(lengths[3:])) == 1 and lengths[3] == plain[0] - {"flux2": 48, "omni": 8 + 8 + 16 + 8, "omni_plain": 8 + 16}.get(name, 12)


@pytest.mark.parametrize("name", FREEZE)
def test_frozen_references_are_approximate_and_near_and_better_than_none(name):
    full, records = sample(patcher(name), name, **both(name)), []
    frozen = sample(cached(patcher(name), records), name, **both(name))
    bare = sample(patcher(name), name, positive=conditioning(name, 11), negative=conditioning(name, 12))
    off = (frozen - full).norm() / full.norm()
    assert 1e-6 < off < (bare - full).norm() / full.norm()
    assert (records[0].full, records[0].frozen, records[0].errors) == (2, STEPS - 2, {}) and "error not measured" in records[0].line()


@pytest.mark.parametrize("name", FREEZE)
def test_k_and_v_taken_at_the_same_sigma_and_latent_give_the_full_prediction(name):
    """What is frozen is right, block by block: with nothing having moved since, nothing changes."""
    got = []

    def twice(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got.extend(denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args).clone() for _ in range(3))
        return x

    noise = tiny.noise(name, batch=2)
    with torch.inference_mode():
        comfy.sample.sample_custom(cached(patcher(name), first=1), noise, 3.0, comfy.samplers.KSAMPLER(twice), torch.tensor([0.8, 0.0]),
                                   *both(name, *references(name, 31, 32)).values(), noise * 0, disable_pbar=True, seed=1)
    assert torch.equal(got[1], got[2]) and (got[0] - got[1]).abs().max() <= 2e-5 * got[0].abs().max()


def told(frozen, full) -> float:
    return ((frozen - full).double().norm() / full.double().norm()).item()


def replayed(patched, name, points, cfg):
    """The guided predictions of a model at these latents and sigmas, in one run."""
    got = []

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got.extend(denoise(x, now * x.new_ones(len(x)), **extra_args).clone() for x, now in points)
        return x

    noise = tiny.noise(name)
    with torch.inference_mode():
        comfy.sample.sample_custom(patched, noise, cfg, comfy.samplers.KSAMPLER(sampler), torch.tensor([0.9, 0.2]), *both(name).values(), noise * 0,
                                   disable_pbar=True, seed=1)
    return got


@pytest.mark.parametrize("name", FREEZE)
def test_the_errors_that_are_told_are_the_true_ones_of_their_evaluations(name):
    """The first frozen evaluation, and a refresh: against the host at the very same latents, with K and V of the same evaluation."""
    points = [(torch.randn(tiny.noise(name).shape, generator=torch.Generator().manual_seed(i)), torch.tensor(0.9 - 0.1 * i)) for i in range(7)]
    records, silent = [], []
    run = replayed(cached(patcher(name), records, refresh=3, measure=True), name, points, cfg=1.0)
    unmeasured = replayed(cached(patcher(name), silent, refresh=3), name, points, cfg=1.0)
    hosts, from_1 = (replayed(patched, name, points, cfg=1.0) for patched in (patcher(name), cached(patcher(name))))
    assert all(map(torch.equal, run, unmeasured)) and list(silent[0].errors) == [4] and list(records[0].errors) == [2, 4]
    assert [torch.equal(a, b) for a, b in zip(run, hosts, strict=True)] == [True, True, False, False, True, False, False]
    assert records[0].errors[2] == pytest.approx(told(run[2], hosts[2]), rel=1e-7) and records[0].errors[2] > 1e-6
    assert records[0].errors[4] == pytest.approx(told(from_1[4], hosts[4]), rel=1e-7) and silent[0].errors[4] == records[0].errors[4]
    assert f"{share(records[0].errors[4])} of the denoised latent at evaluation 4" in records[0].line()
    assert (records[0].full, records[0].frozen, records[0].mixed) == (3, 4, 0)


def denoised(patched, name: str, cfg: float, conds: dict) -> list:
    """What the sampler gets at every step."""
    got = []
    sample(patched, name, cfg=cfg, steps=4, callback=lambda step, x0, x, total: got.append(x0.clone()), **conds)
    return got


@pytest.mark.parametrize("sides", ["alike", "unlike", "positive alone"])
@pytest.mark.parametrize("cfg", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_the_error_is_that_of_what_the_sampler_gets_with_guidance(name, cfg, sides):
    """Of the first frozen evaluation, whose latent is that of the host's run: nothing was frozen before it."""
    negative = {"alike": references(name, 31), "unlike": references(name, 33, 34), "positive alone": []}[sides]
    conds, records = {"positive": conditioning(name, 11, *references(name, 31)), "negative": conditioning(name, 12, *negative)}, []
    frozen, full = denoised(cached(patcher(name), records, measure=True), name, cfg, conds), denoised(patcher(name), name, cfg, conds)
    assert torch.equal(frozen[1], full[1]) and records[0].errors == {2: pytest.approx(told(frozen[2], full[2]), rel=1e-3)}
    assert "of the denoised latent at evaluation 2" in records[0].line()


def rescaled(patched):
    """Guidance of another kind than cfg's."""
    clone = patched.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])
    return clone


@pytest.mark.parametrize("kind", ["post cfg", "two prompts"])
def test_an_error_that_is_not_of_the_denoised_latent_is_told_as_what_it_is(kind):
    records, watched = [], []

    def wrapper(executor, *args, **kwargs):
        watched.append(executor(*args, **kwargs).clone())
        return watched[-1]

    patched = cached(rescaled(patcher("flux2")) if kind == "post cfg" else patcher("flux2"), records, measure=True)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test.watch", wrapper)     # behind the cache, so it sees what is computed to measure
    more = conditioning("flux2", 13, *references("flux2", 33)) if kind == "two prompts" else []
    conds = {"positive": conditioning("flux2", 11, *references("flux2", 31, 32)) + more, "negative": conditioning("flux2", 12, *references("flux2", 33))}
    sample(patched, "flux2", **conds)       # of unlike references, so there are two calls
    frozen, full = torch.cat(watched[4:8:2]), torch.cat(watched[5:8:2])
    assert records[0].errors == {2: pytest.approx(told(frozen, full), rel=1e-7)}
    assert "of the predictions before guidance at evaluation 2" in records[0].line()


@pytest.mark.parametrize(("settings", "said"), [
    ({"refresh": 1}, "refresh_every 1 computes every evaluation in full, so nothing was frozen; choose 2 or more, or 0 for never"),
    ({"first": STEPS}, "no evaluation came after those that are computed in full")])
def test_a_run_that_froze_nothing_says_why(settings, said):
    records = []
    sample(cached(patcher("flux2"), records, **settings), "flux2", **both("flux2"))
    assert said in records[0].line()


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_only_the_sides_that_are_computed_are_reserved_for(cfg, monkeypatch):
    seen, real = [], latents.Freezing.needed
    monkeypatch.setattr(latents.Freezing, "needed", lambda *args: seen.append(real(*args)) or seen[-1])
    records = []
    sample(cached(patcher("flux2"), records), "flux2", cfg=cfg, **both("flux2"))
    kept = records[0].bytes
    assert seen == [pytest.approx(kept, rel=0.05)]     # positions are beside it


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "omni"])
def test_each_condition_and_each_picture_of_a_batch_has_its_own_k_and_v(name):
    noise = tiny.noise(name, batch=2)
    conds = {"positive": conditioning(name, 11, *references(name, 31)), "negative": conditioning(name, 12, *references(name, 32))}
    patched, sizes = cached(patcher(name)), []
    whole = sample(spied(patched, WrappersMP.APPLY_MODEL, lambda executor, args, kwargs: sizes.append(len(args[0]))), name, noise=noise, **conds)
    assert set(sizes) == {4}
    alone = torch.cat([sample(patched, name, noise=noise[i:i + 1], **conds) for i in range(2)])
    assert (whole - alone).abs().max() <= 1e-4 * whole.abs().max()
    shared = {**conds, "negative": conditioning(name, 12, *references(name, 31))}
    assert not near(sample(patched, name, noise=noise, **shared), whole, 1e-3)


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "krea2_edit", "omni"])
def test_positive_and_negative_of_unlike_references_are_run_apart_and_kept_apart(name):
    conds = {"positive": conditioning(name, 11, *references(name, 31, 32)), "negative": conditioning(name, 12, *references(name, 33))}
    records = []
    got = sample(cached(patcher(name), records), name, **conds)
    assert torch.isfinite(got).all() and records[0].frozen == STEPS - 2
    full = sample(patcher(name), name, **conds)
    assert 1e-6 < told(got, full) < told(sample(patcher(name), name, positive=conditioning(name, 11), negative=conditioning(name, 12)), full)


@pytest.mark.parametrize("name", ["qwen_image", "qwen_2511"])
def test_a_text_mask_reaches_qwen_s_attention_with_frozen_references(name):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    conds = both(name, attention_mask=mask)
    full, frozen = (sample(patched, name, **conds) for patched in (patcher(name), cached(patcher(name))))
    unmasked = sample(cached(patcher(name)), name, **both(name))
    assert 1e-7 < told(frozen, full) < told(unmasked, full)


def test_conditions_that_start_late_are_in_full_first():
    late = conditioning("flux2", 13, *references("flux2", 32), start_percent=0.5, end_percent=1.0)
    early = conditioning("flux2", 11, *references("flux2", 31), start_percent=0.0, end_percent=0.5)
    conds = {"positive": early + late, "negative": conditioning("flux2", 12, *references("flux2", 31))}
    records = []
    sample(cached(patcher("flux2"), records), "flux2", **conds)
    assert records[0].full + records[0].mixed == 4 and records[0].frozen == STEPS - 4


def test_fp8_halves_what_is_kept_or_better_and_is_further_off():
    records = {}
    full = sample(patcher("flux2"), "flux2", **both("flux2"))
    off = {}
    for storage in ("same", "fp8"):
        records[storage] = []
        off[storage] = told(sample(cached(patcher("flux2"), records[storage], storage=storage), "flux2", **both("flux2")), full)
    same, fp8 = (records[storage][0].bytes for storage in ("same", "fp8"))
    assert same == 2 * 3 * 2 * 48 * 128 * 4 + 2 * 48 * 4 * 4 and fp8 < same / 3.5
    assert off["fp8"] != off["same"] and off["fp8"] < 3 * off["same"] + 0.05


@pytest.mark.parametrize("name", FREEZE)
def test_what_is_reserved_is_what_is_kept(name, monkeypatch):
    records, asked, needed, real = [], [], [], latents.Freezing.needed
    monkeypatch.setattr(latents.Freezing, "needed", lambda self, *args: needed.append(real(self, *args)) or needed[-1])
    spy = spied(cached(patcher(name), records), WrappersMP.PREPARE_SAMPLING, lambda executor, args, kwargs: asked.append(args[1]))
    sample(spy, name, batch=2, **both(name))
    assert needed[0] <= records[0].bytes <= needed[0] * 1.1 and asked[0][-1] > tiny.noise(name).shape[-1]


def test_freezing_goes_together_with_controlnet_and_an_attention_override():
    calls = []

    def override(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    for name in ("omni", "qwen_image"):
        patched = cached(patcher(name)).clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = override
        calls.clear()
        conds = both(name, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]])) if name == "qwen_image" else both(name)
        assert torch.equal(sample(patched, name, **conds), sample(cached(patcher(name)), name, **conds)) and len(calls) >= STEPS * len(stacks(name))
    control = {"control": Control(1, 2, tokens=64), "control_apply_to_uncond": True}
    records = []
    got = sample(cached(patcher("flux2"), records), "flux2", **both("flux2", **control))
    assert records[0].frozen == STEPS - 2 and not near(got, sample(cached(patcher("flux2")), "flux2", **both("flux2")), 1e-3)


def test_a_krea_2_that_makes_no_tokens_of_its_references_is_left_alone_and_the_reason_is_told():
    records, latent = [], references("krea2_edit", 31)[0]
    conds = [ReferenceLatent.execute(tiny.conditioning("krea2", seed), {"samples": latent}).result[0] for seed in (11, 12)]
    got = sample(cached(model("krea2"), records), "krea2", positive=conds[0], negative=conds[1])
    assert torch.equal(got, sample(model("krea2"), "krea2", positive=conds[0], negative=conds[1])) and "Edit Model Reference Method" in records[0].line()


def test_tiles_are_computed_in_full():
    def tiled(patched):
        clone = patched.clone()
        clone.set_model_unet_function_wrapper(lambda apply, args: torch.cat([
            apply(args["input"][..., part:part + 4], args["timestep"], **args["c"]) for part in (0, 4)], -1))
        return clone

    records = []
    assert torch.equal(sample(tiled(cached(patcher("flux2"), records)), "flux2", **both("flux2")), sample(tiled(patcher("flux2")), "flux2", **both("flux2")))
    assert "as tiling does" in records[0].line() and not records[0].frozen


@pytest.mark.parametrize("name", ["flux2", "omni"])
@pytest.mark.parametrize("where", ["taking", "attending"])
def test_without_memory_for_it_the_run_is_the_host_s_own(name, where, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    if where == "taking":
        monkeypatch.setattr(kept, "stored", full)
    else:
        monkeypatch.setattr(join.Buffers, "joined", full)
    records = []
    assert torch.equal(sample(cached(patcher(name), records), name, **both(name)), sample(patcher(name), name, **both(name)))
    assert "memory ran out" in records[0].line() and not records[0].frozen


def test_a_compiled_model_is_computed_in_full():
    records, compiled = [], patcher("flux2").clone()
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, latents.COMPILE, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    assert torch.equal(sample(cached(compiled, records), "flux2", **both("flux2")), sample(patcher("flux2"), "flux2", **both("flux2")))
    assert "torch.compile" in records[0].line()


def test_guidance_that_skips_layers_is_computed_in_full_beside_a_frozen_main_pass():
    def guided(patched):
        return SkipLayerGuidanceDiT.execute(patched, 2.0, 0.0, 1.0, "", "1").result[0]

    records = []
    got = sample(cached(guided(patcher("flux2")), records), "flux2", **both("flux2"))
    assert (records[0].full, records[0].frozen, records[0].mixed) == (2, 0, STEPS - 2)
    full, unguided = sample(guided(patcher("flux2")), "flux2", **both("flux2")), sample(patcher("flux2"), "flux2", **both("flux2"))
    assert 1e-6 < told(got, full) < told(unguided, full)


@pytest.mark.parametrize("order", ["injector first", "injector last"])
def test_frozen_references_go_together_with_easycontrol(order):
    net, name, bank = network_of("flux"), "flux", Bank()
    handle = Handle((Reference(condition(net)),))
    conds = {side: with_references(texts, handle) for side, texts in both(name).items()}

    def made(**settings):
        if order == "injector first":
            return cached(attach_references(patcher(name), bank=bank), **settings)
        return attach_references(cached(patcher(name), **settings), bank=bank)

    full = sample(attach_references(patcher(name), bank=bank), name, **conds)
    assert torch.equal(sample(made(refresh=1), name, **conds), full)
    without = sample(patcher(name), name, **both(name))
    assert 1e-6 < told(sample(made(), name, **conds), full) < told(without, full)


# what both modes promise ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["exact", "freeze"])
@pytest.mark.parametrize("name", FREEZE)
def test_without_references_the_run_is_the_host_s(name, mode):
    records = []
    got = sample(cached(patcher(name), records, mode=mode), name, positive=conditioning(name, 11), negative=conditioning(name, 12))
    assert torch.equal(got, sample(patcher(name), name, positive=conditioning(name, 11), negative=conditioning(name, 12)))
    assert "no condition carries a reference latent" in records[0].line()


@pytest.mark.parametrize("mode", ["exact", "freeze"])
@pytest.mark.parametrize("name", ["omnigen2", "z_image_pixel", "sd15_like", "wan"])
def test_a_model_that_is_not_known_is_the_host_s_own_run_and_says_so(name, mode):
    kind, records = tiny.KINDS[name], []
    refs = [torch.randn(kind.latent(8), generator=torch.Generator().manual_seed(3))]
    conds = [ReferenceLatent.execute(tiny.conditioning(name, seed), {"samples": refs[0]}).result[0] for seed in (11, 12)]
    got = sample(cached(model(name), records, mode=mode), name, positive=conds[0], negative=conds[1])
    assert torch.equal(got, sample(model(name), name, positive=conds[0], negative=conds[1]))
    assert "computed in full" in records[0].line() and "0 evaluations" not in records[0].line()


def hooked(patched) -> dict:
    return {name: (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module)) for name, module in patched.model.named_modules()}


@pytest.mark.parametrize("mode", ["exact", "freeze"])
def test_nothing_is_left_on_the_model(mode):
    base = patcher("flux2")
    wrappers = {kind: {key: list(held) for key, held in found.items()} for kind, found in base.wrappers.items()}
    options = dict(base.model_options["transformer_options"])
    patched, hooks = cached(base, mode=mode), hooked(base)
    sample(patched, "flux2", **both("flux2"))
    assert {kind: {key: list(held) for key, held in found.items()} for kind, found in base.wrappers.items()} == wrappers
    assert base.model_options["transformer_options"] == options and latents.RUN not in patched.model_options["transformer_options"]
    assert hooked(base) == hooks


@pytest.mark.parametrize("mode", ["exact", "freeze"])
def test_a_guider_that_samples_twice_has_its_options_back_and_keeps_its_references(mode):
    guider, noise = comfy.samplers.CFGGuider(cached(attach_references(patcher("flux2"), bank=Bank()), mode=mode)), tiny.noise("flux2")
    guider.set_conds(*both("flux2").values())
    guider.set_cfg(3.0)
    options = guider.model_options
    with torch.inference_mode():
        runs = [guider.sample(noise, noise * 0, comfy.samplers.sampler_object("euler"), torch.linspace(1, 0, 6), disable_pbar=True, seed=1) for _ in range(2)]
    assert guider.model_options is options and torch.equal(*runs)
    bare = sample(patcher("flux2"), "flux2", positive=conditioning("flux2", 11), negative=conditioning("flux2", 12), steps=5, sigmas=torch.linspace(1, 0, 6))
    assert not near(runs[1], bare, 1e-3)


@pytest.mark.parametrize("name", ["flux2", "omni"])
def test_an_interrupted_frozen_run_leaves_nothing(name):
    patched, records, calls = None, [], []
    patched = cached(patcher(name), records)

    def stop(module, args, kwargs=None):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = stacks(name)[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(patched, name, cfg=1.0, **both(name))
    handle.remove()
    assert records[0].frozen and latents.RUN not in patched.model_options["transformer_options"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in patcher(name).model.modules())
    assert torch.equal(sample(patched, name, **both(name)), sample(cached(patcher(name)), name, **both(name)))


@pytest.mark.parametrize("level", ["guided output", "model output", "block range", "automatic"])
@pytest.mark.parametrize("order", ["cache first", "cache last"])
@pytest.mark.parametrize("name", ["flux2", "omni", "qwen_image"])
def test_step_cache_and_frozen_references_serve_one_run(name, order, level):
    records, reports = [], []
    settings = {"measure": True, "refresh": 4}

    def stepped(patched):
        return attached(patched, policy="interval", level=level, reports=reports)

    patched = stepped(cached(patcher(name), records, **settings)) if order == "cache first" else cached(stepped(patcher(name)), records, **settings)
    got = sample(patched, name, **both(name))
    full = sample(patcher(name), name, **both(name))
    assert torch.isfinite(got).all() and told(got, full) < 0.5
    assert reports[0].computed < STEPS and records[0].frozen > 0 and "several times" not in reports[0].line() + records[0].line()
    assert all(error < 0.5 for error in records[0].errors.values()) and records[0].errors


def test_step_cache_and_exact_references_serve_one_run():
    reports, records = [], []
    patched = attached(exact(patcher("flux2"), records=records), policy="interval", level="block range", reports=reports)
    got = sample(patched, "flux2", **both("flux2"))
    assert reports[0].computed < STEPS and told(got, sample(joint(), "flux2", **both("flux2", method="index_timestep_zero"))) < 0.3
    assert records[0].entries.made


def test_the_host_s_own_cache_on_the_same_model_is_refused_in_one_sentence():
    theirs = FluxKVCache.execute(patcher("flux2")).result[0]
    for mode in ("exact", "freeze"):
        with pytest.raises(ValueError, match="Flux KV Cache"):
            cached(theirs, mode=mode)
        with pytest.raises(ValueError, match="take one of the two nodes away"):
            sample(FluxKVCache.execute(cached(patcher("flux2"), mode=mode)).result[0], "flux2", **both("flux2"))


# the node --------------------------------------------------------------------------------------------------------------
def execute(**inputs):
    node = group.ReferenceLatentCache.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return node.execute(patcher("flux2"), **inputs).result[0]


def test_the_node_s_schema_is_valid_says_what_is_approximate_and_is_off_by_default():
    schema = group.ReferenceLatentCache.GET_SCHEMA()
    schema.validate()
    parameters = inspect.signature(group.ReferenceLatentCache.execute).parameters
    assert {entry.id for entry in schema.inputs} == set(parameters) and all(entry.tooltip for entry in schema.inputs)
    assert all(entry.optional and entry.default == parameters[entry.id].default for entry in schema.inputs if entry.id != "model")
    assert "approximate" in schema.description and "another picture" in schema.description
    assert execute() is patcher("flux2") and execute(mode="off", measure=True) is patcher("flux2")


def test_the_node_puts_its_settings_on_the_model_and_refuses_what_cannot_be():
    patched = execute(mode="freeze", full_evaluations=4, refresh_every=5, measure=True, storage="fp8")
    assert patched.model_options["transformer_options"][latents.KEY].settings == Settings("freeze", 4, 5, True, "fp8")
    for wrong in ({"full_evaluations": 0}, {"refresh_every": -1}, {"full_evaluations": float("nan")}, {"mode": "magic"}, {"mode": "exact", "storage": "fp8"}):
        with pytest.raises(ValueError) as caught:
            execute(**{"mode": "freeze"} | wrong)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
