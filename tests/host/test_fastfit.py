"""FastFit against an explicit joint attention, written from the paper's description over the tensors of the checkpoint alone."""
import math
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, Upsample, timestep_embedding
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from harness import model
from safetensors.torch import save_file
from torch.nn import functional as F

from pack.core.reference.bank import Bank
from pack.core.reference.fastfit import CLASSES, FastFitReference
from pack.core.reference.fastfit_checkpoint import OWN, WrongFile, build, load_fastfit, renamed, unet_config
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import Keeping, attach_references
from pack.core.reference.join import Mismatch
from pack.core.reference.ready import Ready
from pack.core.reference.seams import SEAMS
from testbed import tiny, tiny_fastfit

SCALE = 0.18215     # of SD 1.5's latents, published
SIZE = (8, 6)
TENSORS = tiny_fastfit.tensors()


def fastfit(**changed):
    tensors = {**TENSORS, **changed}
    config = unet_config(tensors, "tiny")
    return build(renamed(tensors, config, "tiny"), config, dtype=torch.float32)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def garment(seed=5, label="upper", size=(8, 6)) -> FastFitReference:
    return FastFitReference(drawn(seed, 1, 4, *size), label)


def handle(*garments, **used) -> Handle:
    return Handle(tuple(Reference(one, **used) for one in garments))


def conditioning(size=SIZE, seed=21) -> list:
    mask = (drawn(seed, 1, 1, *size) > 0).float()
    return [[torch.zeros(1, 1, 768), {"concat_latent_image": drawn(seed + 1, 1, 4, *size), "concat_mask": mask}]]


# The reference implementation.

def softmax_attention(q, k, v, heads, weights=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    odds = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
    odds = odds if weights is None else odds * weights
    return ((odds / odds.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


class Features:
    """One pass over the UNet's layers. `read`: features of references per layer, each with its weight; `written`: of this pass."""

    def __init__(self, net, read=(), copies=1):
        self.net, self.read, self.copies, self.written = net, read, copies, []

    def transformer(self, layer, x):
        b, c, h, w = x.shape
        y = F.conv2d(F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6), layer.proj_in.weight, layer.proj_in.bias).flatten(2).transpose(1, 2)
        for block in layer.transformer_blocks:
            n = F.layer_norm(y, (c,), block.norm1.weight, block.norm1.bias)
            index = len(self.written)
            self.written.append(n)
            seen = [n] + [features[index].expand(b, -1, -1) for features, _ in self.read]
            weights = torch.cat([torch.full((s.shape[1],), weight) for s, weight in zip(seen, [1.0] + [w for _, w in self.read], strict=True)])
            seen, weights = torch.cat(seen * self.copies, 1), weights.repeat(self.copies)
            attn = block.attn1
            out = softmax_attention(n @ attn.to_q.weight.T, seen @ attn.to_k.weight.T, seen @ attn.to_v.weight.T, 8, weights)
            y = y + F.linear(out, attn.to_out[0].weight, attn.to_out[0].bias)
            a, gate = F.linear(F.layer_norm(y, (c,), block.norm3.weight, block.norm3.bias), block.ff.net[0].proj.weight, block.ff.net[0].proj.bias).chunk(2, -1)
            y = y + F.linear(a * F.gelu(gate), block.ff.net[2].weight, block.ff.net[2].bias)
        return x + F.conv2d(y.transpose(1, 2).unflatten(2, (h, w)), layer.proj_out.weight, layer.proj_out.bias)

    def through(self, layers, h, emb, shape=None):
        for layer in layers:
            if isinstance(layer, SpatialTransformer):
                h = self.transformer(layer, h)
            elif isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, Upsample):
                h = layer(h, shape)
            else:
                h = layer(h)
        return h

    def run(self, h, emb):
        """h: after the first convolution."""
        hs = [h]
        for layers in self.net.input_blocks[1:]:
            hs.append(self.through(layers, hs[-1], emb))
        h = self.through(self.net.middle_block, hs[-1], emb)
        for layers in self.net.output_blocks:
            h = self.through(layers, torch.cat([h, hs.pop()], 1), emb, hs[-1].shape if hs else None)
        return self.net.out(h)


def features_of(patcher, one: FastFitReference, null=False) -> list:
    """The normed input of every self-attention layer in the reference pass, from the checkpoint's own two tensors."""
    latent = one.latent * (0 if null else SCALE)
    net = Features(patcher.model.diffusion_model)
    net.run(F.conv2d(latent, TENSORS["condition_conv_in.weight"], TENSORS["condition_conv_in.bias"], padding=1),
            TENSORS["class_embedding.weight"][CLASSES.index(one.label)][None])
    return net.written


def explicit(patcher, x, sigma, conds, garments, weights=None, null=False, copies=1):
    """The model's prediction of the noise."""
    net, more = patcher.model.diffusion_model, conds[0][1]
    weights = weights or [1.0] * len(garments)
    batch = len(x)
    said = torch.cat([x / math.sqrt(sigma ** 2 + 1), more["concat_mask"].expand(batch, -1, -1, -1),
                      (more["concat_latent_image"] * SCALE).expand(batch, -1, -1, -1)], 1)
    time = patcher.get_model_object("model_sampling").timestep(torch.full((batch,), sigma)).float()
    read = [(features_of(patcher, one, null), weight) for one, weight in zip(garments, weights, strict=True)]
    return Features(net, read, copies).run(F.conv2d(said, net.input_blocks[0][0].weight, net.input_blocks[0][0].bias, padding=1),
                                           net.time_embed(timestep_embedding(time, net.model_channels)))


# The pack, through the whole of the host's machinery.

def by_pack(patcher, references: Handle, sigma=3.0, cfg=1.0, conds=None, negative=None, size=SIZE, batch=1, bank=None, keeping=None, seed=1):
    """The first prediction of noise that a sampler gets, and what it was asked about."""
    got = SimpleNamespace(calls=0)

    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        got.x = x.clone()
        got.eps = (x - denoise(x, sigmas[0] * x.new_ones(len(x)), **extra_args)) / sigmas[0]
        return x

    def counted(executor, x, *args, **kwargs):
        got.calls += 1
        got.rows = len(x)
        return executor(x, *args, **kwargs)

    attached = attach_references(patcher, keeping=keeping, bank=bank if bank is not None else Bank())
    attached.add_wrapper_with_key("apply_model", "test", counted)
    conds = conds or conditioning(size)
    noise = drawn(seed, batch, 4, *size)
    with torch.inference_mode():
        comfy.sample.sample_custom(
            attached, noise, cfg, comfy.samplers.KSAMPLER(sampler), torch.tensor([sigma, 0.0]), with_references(conds, references),
            with_references(conds, references.other_side() if negative is None else negative), noise * 0, disable_pbar=True, seed=seed)
    return got


@pytest.fixture(scope="module")
def patcher():
    return fastfit()


OUTFITS = {
    "one": [garment(5)],
    "one of another size": [garment(5, size=(12, 10))],
    "one of an odd size": [garment(5, "bag", size=(5, 7))],
    "three": [garment(5), garment(6, "lower", (10, 8)), garment(7, "shoe", (4, 4))],
}


@pytest.mark.parametrize("name", OUTFITS)
@pytest.mark.parametrize("size", [(8, 6), (10, 10)])
def test_references_equal_the_explicit_joint_attention(patcher, name, size):
    got = by_pack(patcher, handle(*OUTFITS[name]), size=size)
    with torch.inference_mode():
        wanted = explicit(patcher, got.x, 3.0, conditioning(size), OUTFITS[name])
        without = explicit(patcher, got.x, 3.0, conditioning(size), [])
    assert (wanted - without).abs().max() > 1e-2
    assert (got.eps - wanted).abs().max() <= 1e-5


def test_without_references_the_model_is_the_inpainting_unet_without_cross_attention(patcher):
    got = by_pack(patcher, Handle())
    with torch.inference_mode():
        assert (got.eps - explicit(patcher, got.x, 3.0, conditioning(), [])).abs().max() <= 1e-5


def test_the_order_of_references_does_not_matter(patcher):
    one, two = OUTFITS["three"][:2]
    there, back = (by_pack(patcher, handle(*both)).eps for both in ((one, two), (two, one)))
    assert (there - back).abs().max() <= 1e-5


def test_the_negative_sees_null_references_of_the_same_class(patcher):
    garments, conds = OUTFITS["three"], conditioning()
    got = by_pack(patcher, handle(*garments), cfg=2.5)
    with torch.inference_mode():
        cond, null, none = (explicit(patcher, got.x, 3.0, conds, seen, null=null) for seen, null in ((garments, False), (garments, True), ([], False)))
    assert (null - none).abs().max() > 1e-2
    assert (got.eps - (null + 2.5 * (cond - null))).abs().max() <= 1e-5 * 2.5


@pytest.mark.parametrize("batch", [1, 2])
def test_positive_and_negative_are_one_batch_that_equals_two_calls(patcher, batch):
    references = handle(*OUTFITS["three"])
    got = by_pack(patcher, references, cfg=2.5, batch=batch)
    assert (got.calls, got.rows) == (1, 2 * batch)
    positive = by_pack(patcher, references, batch=batch).eps
    negative = by_pack(patcher, references.other_side(), batch=batch).eps
    assert (got.eps - (negative + 2.5 * (positive - negative))).abs().max() <= 1e-5


def test_an_empty_negative_is_sampled_too(patcher):
    got = by_pack(patcher, handle(garment()), cfg=2.5, negative=Handle())
    with torch.inference_mode():
        cond, none = (explicit(patcher, got.x, 3.0, conditioning(), seen) for seen in ([garment()], []))
    assert got.calls == 2 and (got.eps - (none + 2.5 * (cond - none))).abs().max() <= 1e-5 * 2.5


@pytest.mark.parametrize(("other", "calls"), [((6, 8), 1), ((4, 12), 2)])
def test_sizes_are_one_batch_where_they_have_as_many_tokens_at_every_resolution(patcher, other, calls):
    """4 x 12 has the 48 tokens of 8 x 6, and as many at half of it, but not at a quarter."""
    one, two = garment(5), garment(6, size=other)
    got = by_pack(patcher, handle(one), cfg=2.5, negative=handle(two))
    with torch.inference_mode():
        cond, null = (explicit(patcher, got.x, 3.0, conditioning(), [seen]) for seen in (one, two))
    assert got.calls == calls and (got.eps - (null + 2.5 * (cond - null))).abs().max() <= 1e-5 * 2.5


def test_an_entry_that_is_there_already_is_lent_as_it_is_and_only_to_a_unet_of_its_layout(patcher):
    bank = Bank()
    first = by_pack(patcher, handle(garment(5, size=(12, 10))), bank=bank).eps
    ready = Ready(next(iter(bank.entries.values())), seam="unet")
    assert torch.equal(by_pack(patcher, handle(ready)).eps, first)
    assert not ready.unfit(patcher.model.diffusion_model)
    for name, kind in (("sd15_like", "UNetModel"), ("flux", "Flux")):
        assert ready.unfit(model(name).model.diffusion_model) == (
            f"FastFit upper, 80 x 96 was made for 11 blocks and {kind} has 0 of the kind; use it with the fastfit model that it was made for")
    cut = replace(ready.entry, blocks={**ready.entry.blocks, "middle.0.0": tuple(tensor[..., :3] for tensor in ready.entry.blocks["middle.0.0"])})
    assert Ready(cut, seam="unet").unfit(patcher.model.diffusion_model) == (
        "FastFit upper, 80 x 96 has 8 heads of 3 channels in block middle.0.0 and the model 8 of 16; use it with the fastfit model that it was made for")


def test_doubling_all_keys_and_values_as_the_published_code_does_changes_nothing(patcher):
    got = by_pack(patcher, handle(*OUTFITS["three"]))
    with torch.inference_mode():
        doubled = explicit(patcher, got.x, 3.0, conditioning(), OUTFITS["three"], copies=2)
    assert (got.eps - doubled).abs().max() <= 1e-5


def test_a_weight_multiplies_the_attention_that_a_reference_gets(patcher):
    one, two = OUTFITS["three"][:2]
    got = by_pack(patcher, handle(one, weight=0.5) + handle(two, weight=1.7))
    with torch.inference_mode():
        wanted = explicit(patcher, got.x, 3.0, conditioning(), [one, two], [0.5, 1.7])
        plain = explicit(patcher, got.x, 3.0, conditioning(), [one, two])
    assert (wanted - plain).abs().max() > 1e-3
    assert (got.eps - wanted).abs().max() <= 1e-5


def test_a_weight_of_zero_leaves_a_reference_out_and_encodes_nothing(patcher):
    bank, one, two = Bank(), *OUTFITS["three"][:2]
    got = by_pack(patcher, handle(one) + handle(two, weight=0.0), bank=bank)
    assert torch.equal(got.eps, by_pack(patcher, handle(one)).eps) and len(bank) == 1


def run_keys(patcher, references, **run):
    bank = Bank()
    by_pack(patcher, references, bank=bank, cfg=2.5, **run)
    return {entry.key.digest for entry in bank.entries.values()}


def test_entries_are_shared_by_seeds_sizes_persons_and_guidance_and_not_by_weights_classes_or_garments(patcher):
    before = run_keys(patcher, handle(garment()))
    assert len(before) == 2
    assert run_keys(patcher, handle(garment()), seed=9) == before
    assert run_keys(patcher, handle(garment()), size=(12, 8), sigma=0.7) == before
    assert run_keys(patcher, handle(garment()), conds=conditioning(seed=50)) == before
    assert len(run_keys(patcher, handle(garment(5), garment(6)))) == 3      # the null of a size and class is one
    assert len(run_keys(patcher, handle(garment(6))) & before) == 1
    assert not run_keys(patcher, handle(garment(label="lower"))) & before
    lora = patcher.clone()
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    assert lora.add_patches({name: ("diff", (drawn(3, 32, 32),))}, 0.5)
    assert not run_keys(lora, handle(garment())) & before


def test_a_lora_reaches_references_and_person_alike(patcher):
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    change = drawn(3, 32, 32)
    lora = patcher.clone()
    lora.add_patches({name: ("diff", (change,))}, 0.5)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    got, wanted, plain = (by_pack(one, handle(garment())).eps for one in (lora, fastfit(**{key: TENSORS[key] + 0.5 * change}), patcher))
    assert (got - wanted).abs().max() <= 1e-5 < (plain - wanted).abs().max()


def test_an_entry_takes_the_bytes_that_were_reserved(patcher):
    bank, one = Bank(), garment(size=(10, 7))
    by_pack(patcher, handle(one), bank=bank)
    (entry,) = bank.entries.values()
    assert entry.bytes == one.bytes(patcher.model.diffusion_model, torch.float32) and len(entry.blocks) == 11


def test_the_published_size_takes_the_bytes_of_the_formula():
    """33.05 MiB for 384 x 512 in fp16: 2 x 2 sum n_l T_l C_l."""
    from pack.core.reference.fastfit_checkpoint import Shapes
    from pack.core.reference.fastfit_unet import FastFitUNet

    config = {"image_size": 32, "in_channels": 9, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4,
              "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "num_heads": 8,
              "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "context_dim": 768, "num_class_embeds": 5}
    net = FastFitUNet(**config, device="meta", operations=Shapes)
    formula = 2 * 2 * (5 * 3072 * 320 + 5 * 768 * 640 + 5 * 192 * 1280 + 48 * 1280)
    assert garment(size=(64, 48)).bytes(net, torch.float16) == formula == round(33.046875 * 2 ** 20)


def test_an_existing_replacement_is_called_with_the_larger_keys_and_values(patcher):
    seen, changed = [], patcher.clone()

    def replacement(q, k, v, extra_options):
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return softmax_attention(q, k, v, extra_options["n_heads"])

    changed.set_model_attn1_replace(replacement, "middle", 0)
    got = by_pack(changed, handle(garment()))
    assert seen == [(4, 8, 8)]
    there = {"patches_replace": {"attn1": {("middle", 0): replacement}}}
    segment = SimpleNamespace(entry=SimpleNamespace(blocks={"middle.0.0": None, "input.1.0": None}))
    assert len(SEAMS["unet"](there, None, [segment], None)["patches_replace"]["attn1"]) == 3 and len(there["patches_replace"]["attn1"]) == 1
    assert (got.eps - by_pack(patcher, handle(garment())).eps).abs().max() <= 1e-5
    with pytest.raises(Mismatch, match=r"^another node replaces the self-attention of block middle.0.0 and cannot weigh references; set the weight"):
        by_pack(changed, handle(garment(), weight=0.5))


def test_perturbed_attention_guidance_runs_beside_references(patcher):
    guided = PerturbedAttentionGuidance.execute(patcher, 3.0)[0]
    got, plain = (by_pack(one, handle(garment()), cfg=2.5).eps for one in (guided, patcher))
    assert got.isfinite().all() and (got - plain).abs().max() > 1e-3


def test_a_streamed_entry_gives_the_same_picture(patcher):
    bank, references = Bank(), handle(*OUTFITS["three"])
    first = by_pack(patcher, references, cfg=2.5, bank=bank).eps
    for _ in range(2):
        assert torch.equal(by_pack(patcher, references, cfg=2.5, bank=bank, keeping=Keeping("streamed")).eps, first)
        bank.clear()


def test_the_override_of_attention_is_used_for_person_and_references(patcher):
    seen, changed = [], patcher.clone()

    def override(attention, *args, **kwargs):
        seen.append(args[1].shape[-2])
        return attention(*args, **kwargs)

    changed.model_options["transformer_options"]["optimized_attention_override"] = override
    got = by_pack(changed, handle(garment()))
    assert torch.equal(got.eps, by_pack(patcher, handle(garment())).eps)
    assert seen[:2] == [48, 48] and seen[11:13] == [96, 96] and len(seen) == 22


def test_patches_and_wrappers_of_the_model_do_not_reach_the_reference_pass(patcher):
    calls, changed = [], patcher.clone()
    changed.set_model_output_block_patch(lambda h, skip, options: (calls.append(len(h)), (h, skip))[1])
    changed.add_wrapper_with_key("diffusion_model", "test", lambda executor, *args, **kwargs: (calls.append("wrapper"), executor(*args, **kwargs))[1])
    got = by_pack(changed, handle(garment()))
    assert calls == ["wrapper"] + [1] * 9
    assert torch.equal(got.eps, by_pack(patcher, handle(garment())).eps)


def test_a_run_leaves_nothing_on_the_model(patcher):
    before, state = by_pack(patcher, Handle()).eps, {name: id(module) for name, module in patcher.model.named_modules()}
    by_pack(patcher, handle(garment()), cfg=2.5)
    assert torch.equal(by_pack(patcher, Handle()).eps, before)
    assert state == {name: id(module) for name, module in patcher.model.named_modules()}
    assert not patcher.model_options["transformer_options"]


def test_half_precision_and_fp8_weights_give_nearly_the_same(tmp_path):
    tiny_fastfit.write(tmp_path / "x.safetensors")
    whole = by_pack(fastfit(), handle(garment())).eps
    for weights, least in (("default", 0.99), ("fp8_e4m3fn", 0.9)):
        loaded = load_fastfit(tmp_path / "x.safetensors", weights)
        assert isinstance(loaded, comfy.model_patcher.ModelPatcher)
        got = by_pack(loaded, handle(garment())).eps
        assert F.cosine_similarity(got.flatten().float(), whole.flatten(), 0) > least
    assert loaded.model.diffusion_model.class_embedding.weight.dtype == torch.float8_e4m3fn


def test_hypertile_is_refused_with_one_sentence(patcher):
    tiled = HyperTile.execute(patcher, 32, 2, 0, False)[0]
    with pytest.raises(Mismatch, match=r"^block input.1.0 attends in \d+ tiles, as HyperTile makes them, and references are seen as a whole; take HyperTile"):
        by_pack(tiled, handle(garment()), size=(16, 16))


def test_a_wrong_class_is_refused_with_one_sentence():
    with pytest.raises(ValueError, match=r"^the class of a garment is 'hat'; choose one of upper, lower, overall, shoe, bag$"):
        garment(label="hat")
    few = fastfit(**{"class_embedding.weight": TENSORS["class_embedding.weight"][:3]})
    with pytest.raises(ValueError, match=r"^the FastFit checkpoint knows the classes upper, lower, overall and a reference is of class bag; choose one that"):
        by_pack(few, handle(garment(label="bag")))


def test_a_wrong_base_model_is_refused_with_one_sentence():
    for name, kind in (("sd15_like", "UNetModel"), ("flux", "Flux")):
        with pytest.raises(ValueError, match=rf"^a FastFit reference \(upper\) came to a {kind}, which is no FastFit model; load one with the FastFit Loader$"):
            positive = with_references(tiny.conditioning(name, 11), handle(garment()))
            noise = tiny.noise(name)
            comfy.sample.sample(attach_references(model(name)), noise, 2, 1.0, "euler", "simple", positive, positive, noise * 0, seed=1, disable_pbar=True)


def test_a_latent_of_another_vae_is_refused_with_one_sentence(patcher):
    with pytest.raises(ValueError, match=r"^the FastFit model takes latents of 4 channels and a reference has 16; encode it with the VAE of SD 1.5$"):
        by_pack(patcher, handle(FastFitReference(drawn(1, 1, 16, 8, 6), "upper")))
    with pytest.raises(ValueError, match=r"^a FastFit reference has one latent of 4 channels and a tensor of shape \[2, 4, 8, 6\] came; give one image"):
        FastFitReference(drawn(1, 2, 4, 8, 6), "upper")


def without(*keys):
    return {key: tensor for key, tensor in TENSORS.items() if key not in keys}


SD15 = {**TENSORS, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, 768)}
LAST = "up_blocks.2.resnets.2.conv2.bias"
WRONG = {
    "SD 1.5": (SD15, "^x.safetensors is a UNet with cross-attention, as SD 1.5 has it, and FastFit's has none; choose unet/"),
    "another model": ({"img_in.weight": torch.zeros(4, 4)}, "^x.safetensors has no conv_in.weight, .* but keys such as img_in.weight; choose unet/"),
    "nothing": ({}, "^x.safetensors has no conv_in.weight, which a UNet of a diffusers folder has, but keys such as none; choose unet/"),
    "no second convolution": (without("condition_conv_in.weight"), "^x.safetensors has no condition_conv_in.weight, which FastFit's UNet has; choose unet/"),
    "no classes": (without("class_embedding.weight"), "^x.safetensors has no class_embedding.weight, which FastFit's UNet has; choose unet/"),
    "four channels": ({**TENSORS, "conv_in.weight": torch.zeros(32, 4, 3, 3)}, "^x.safetensors takes 4 channels and FastFit 9: noise, mask and masked"),
    "one more": ({**TENSORS, "lora.up": torch.zeros(1)}, "^x.safetensors has the key lora.up, which FastFit's UNet does not have; choose unet/"),
    "one less": (without(LAST), f"^x.safetensors has no {LAST}; the file is not whole, download it again$"),
    "no middle": ({k: v for k, v in TENSORS.items() if not k.startswith("mid_block")}, "^x.safetensors has no mid_block.attentions.0.proj_in.weight; the"),
    "another shape": ({**TENSORS, LAST: torch.zeros(33)}, rf"^x.safetensors has {LAST} of shape \[33\] where its other layers ask for \[32\]; choose unet/"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_one_sentence(name, tmp_path):
    tensors, sentence = WRONG[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WrongFile, match=sentence) as raised:
        load_fastfit(tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_one_sentence(kept, tmp_path):
    path = tmp_path / "x.safetensors"
    tiny_fastfit.write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(WrongFile, match=r"^x.safetensors is not a whole safetensors file \(.*\); download it again$"):
        load_fastfit(path)


def test_a_pickle_is_never_opened(tmp_path):
    torch.save(TENSORS, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(WrongFile, match=r"^diffusion_pytorch_model.bin is no safetensors file, and others may run code when they are opened; choose unet/"):
        load_fastfit(tmp_path / "diffusion_pytorch_model.bin")


def test_a_unet_of_another_depth_is_loaded_too():
    """Two levels of one block: sizes come from the tensors, not from a table."""
    import comfy.ops
    import comfy.utils
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {**tiny_fastfit.CONFIG, "channel_mult": (1, 3), "num_res_blocks": [1, 1], "transformer_depth": [2, 0], "transformer_depth_output": [2, 1, 0, 1]}
    own = UNetModel(**config, device="cpu", operations=comfy.ops.disable_weight_init).state_dict()
    tensors = {theirs: own[ours] for theirs, ours in comfy.utils.unet_to_diffusers(config).items()
               if ours in own and ".attn2." not in theirs and ".norm2." not in theirs.partition("transformer_blocks")[2]}
    tensors |= {key: TENSORS[key] for key in OWN}
    read = unet_config(tensors, "x")
    assert renamed(tensors, read, "x").keys() == {key for key in own if ".attn2." not in key and ".norm2." not in key} | set(OWN)
    for name in ("channel_mult", "num_res_blocks", "transformer_depth", "transformer_depth_output", "transformer_depth_middle", "model_channels"):
        assert list(read[name]) == list(config[name]) if isinstance(config[name], list | tuple) else read[name] == config[name]
