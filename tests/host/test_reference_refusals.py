"""Models that no reference can be used with, for every system: told in one sentence, with what came, what was expected and what to do."""
import copy
from functools import partial

import pytest
import torch
import tryon
from comfy_extras.nodes_hypertile import HyperTile
from harness import model, sample
from refusing import DOORS, FLUX, fill_variant, flux_of, of_every_system, refused, with_network
from template_files import BLOCKS, base, lora_weights, scalar_weights, template
from torch import nn

from pack.core.reference.bank import Bank
from pack.core.reference.fastfit_checkpoint import build
from pack.core.reference.handle import with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.latents import Run as LatentsRun
from pack.core.reference.latents import Settings, attach_reference_latents
from pack.core.reference.templates.lora import applied, merged
from pack.core.reference.templates.merge import referred
from testbed import tiny, tiny_fastfit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def handles(folder):
    return of_every_system(folder)


# Wrong base model.

# Their blocks have the names of FLUX's.
NAMED_ALIKE = {"chroma": "Chroma", "chroma_radiance": "ChromaRadiance", "hunyuan_video": "HunyuanVideo", "hunyuan_image": "HunyuanVideo"}

BASES = {
    ("EasyControl", "FLUX.2"): (lambda: model("flux2"), "the model is another FLUX; load FLUX.1-dev"),
    ("EasyControl", "Z-Image"): (lambda: model("z_image"), "the model is NextDiT; load a FLUX.1-dev model"),
    ("EasyControl", "Wan"): (lambda: model("wan"), "the model is WanModel; load a FLUX.1-dev model"),
    ("EasyControl", "SD 1.5"): (lambda: model("sd15_like"), "the model is UNetModel; load a FLUX.1-dev model"),
    **{("EasyControl", name): (partial(model, name), f"is an EasyControl adapter for FLUX.1 and the model is {kind}; load a FLUX.1-dev model")
       for name, kind in NAMED_ALIKE.items()},
    ("EasyControl", "FLUX of another depth"): (lambda: flux_of(depth=3), "fits a FLUX of 2 + 3 blocks of width 128 and the model has 3 + 3 of width 128; load"),
    ("EasyControl", "FLUX Fill"): (fill_variant, "takes 384 channels per token and the condition has 64; load plain FLUX.1-dev"),
    ("FastFit", "SD 1.5"): (lambda: model("sd15_like"), "came to a UNetModel, which is no FastFit model; load one with the FastFit Loader"),
    ("FastFit", "FLUX.1"): (lambda: model("flux"), "came to a Flux, which is no FastFit model; load one with the FastFit Loader"),
    ("template", "FLUX.1"): (lambda: model("flux"), "was made for FLUX.2 and the model is FLUX.1; use it with the model that it was made for"),
    **{("template", name): (partial(model, name), f"was made for FLUX.2 and the model is {kind}; use it with the model that it was made for")
       for name, kind in NAMED_ALIKE.items()},
    ("template", "Z-Image"): (lambda: model("z_image"), "was made for 5 blocks and NextDiT has 0 of the kind; use it with the flux2 model"),
    ("template", "FLUX.2 of another depth"): (lambda: model("flux2"), "was made for 5 blocks and Flux has 3 of the kind; use it with the flux2 model"),
    ("template", "FLUX.2 of another width"): (lambda: base(hidden=128), "has 2 heads of 128 channels in block double.0 and the model 1 of 128; use it with"),
    ("saved", "FLUX.2"): (lambda: model("flux2"), "was made for FLUX.1 and the model is FLUX.2; use it with the model that it was made for"),
    ("saved", "SD 1.5"): (lambda: model("sd15_like"), "was made for 5 blocks and UNetModel has 0 of the kind; use it with the flux model"),
    ("saved garment", "FLUX.1"): (lambda: model("flux"), "was made for 11 blocks and Flux has 0 of the kind; use it with the fastfit model"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", BASES, ids=" on ".join)
def test_a_wrong_base_model(handles, case, door):
    made, said = BASES[case]
    refused(lambda: door(made(), handles[case[0]]), said)


@pytest.mark.parametrize("name", ["flux", "z_image", "sd15_like"])
def test_a_wrong_base_model_for_a_template_that_is_a_lora(folder, name):
    lora = merged(template(folder, lora_weights(), "lora").loras([0]), [1.0])
    refused(lambda: applied(model(name), None, None, lora, 1.0, "both", "template lora"), "use it with the model that it was made for")


def carrying(name: str) -> dict:
    latents = [tryon.drawn(31, 1, tiny.KINDS[name].channels, 8, 6)]
    return {side: tiny.conditioning(name, seed, reference_latents=latents) for side, seed in (("positive", 11), ("negative", 12))}


@pytest.mark.parametrize(("mode", "name", "said"), [
    ("exact", "flux", "the model is a Flux of another kind; choose mode 'freeze'"), ("exact", "z_image", "a NextDiT of another kind; choose mode 'freeze'"),
    ("freeze", "wan", "mode 'freeze' knows FLUX, Qwen-Image, Krea 2 and Z-Image Omni, and the model is WanModel")])
def test_a_wrong_base_model_for_reference_latents_is_the_host_s_run_and_told(mode, name, said):
    records = []
    cached = attach_reference_latents(model(name), Settings(mode), records.append)
    assert torch.equal(sample(cached, name, steps=2, **carrying(name)), sample(model(name), name, steps=2, **carrying(name)))
    assert said in records[0].line() and "so all is computed in full" in records[0].line() and "\n" not in records[0].line()


# Engines of their own.

class NunchakuFluxTransformer2dModel(nn.Module):
    pass


class ComfyFluxWrapper(nn.Module):
    """As nunchaku wraps FLUX."""

    def __init__(self):
        super().__init__()
        self.model = NunchakuFluxTransformer2dModel()


class TrTUnet:
    """As the TensorRT node puts an engine in the place of a network."""


def subclass_of(network):
    """As nunchaku's later models are."""
    net = copy.copy(network)
    net.__class__ = type("NunchakuTransformer2DModel", (type(network),), {})
    return net


ENGINES = {"nunchaku's wrapper": (ComfyFluxWrapper, "nunchaku"), "nunchaku's subclass": (lambda: subclass_of(FLUX), "nunchaku"),
           "TensorRT": (TrTUnet, "TensorRT")}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("system", ["EasyControl", "FastFit", "template", "saved", "saved garment"])
def test_a_model_that_another_engine_runs(handles, system, engine, door):
    made, name = ENGINES[engine]
    refused(lambda: door(with_network(made()), handles[system]), f"came to a model that {name} runs ({type(made()).__name__}), and references act in")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_another_engine_runs_gets_no_template_lora(folder, engine):
    made, name = ENGINES[engine]
    lora = merged(template(folder, lora_weights(), "lora").loras([0]), [1.0])
    refused(lambda: applied(with_network(made()), None, None, lora, 1.0, "both", "template lora"), f"template lora came to a model that {name} runs")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["exact", "freeze"])
def test_a_model_that_another_engine_runs_keeps_its_reference_latents(mode, engine):
    made, name = ENGINES[engine]
    run = LatentsRun(Settings(mode), with_network(made()))
    assert run.prepare({"positive": [{"reference_latents": [torch.zeros(1, 16, 8, 8)]}]}, {}, (1, 16, 8, 8)) == 0
    assert f"a model that {name} runs" in run.record.line() and not run.record.served


# An entry from another base.

def tuned(patcher):
    clone, key = patcher.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    clone.add_patches({key: ("diff", (torch.full_like(patcher.model.state_dict()[key], 0.01),))}, 1.0)
    return clone


OTHERS = {
    "another checkpoint": (lambda: tiny.patcher("flux", seed=5), "made for another model, or the model with other LoRAs (base: "),
    "another LoRA": (lambda: tuned(model("flux")), "made for another model, or the model with other LoRAs (base: "),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_entry_from_another_base(handles, other):
    made, said = OTHERS[other]
    positive = with_references(tiny.conditioning("flux", 11), handles["saved"])
    refused(lambda: sample(attach_references(made(), bank=Bank()), "flux", cfg=1.0, steps=1, positive=positive), said)


def test_a_garment_from_another_base(handles):
    wider = {**tiny_fastfit.CONFIG, "model_channels": 64, "num_class_embeds": 5, "context_dim": 768}
    other = build({}, wider, dtype=torch.float32)
    for door in DOORS:
        refused(lambda door=door: door(other, handles["saved garment"]), "has 8 heads of 4 channels in block input.1.0 and the model 8 of 8; use it")


def test_templates_of_two_bases(folder, handles):
    other = template(folder, scalar_weights(blocks=BLOCKS[:-1]), "smaller").entry((0.5,))
    refused(lambda: referred(other, before=handles["template"]), "cannot act together: the first is for a model of 5 blocks of 2 heads and the second")


# HyperTile.

@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_hypertile_with_garments(cfg):
    tiled = HyperTile.execute(tryon.fastfit(), 32, 2, 0, False)[0]
    refused(lambda: tryon.by_pack(tiled, tryon.handle(tryon.garment()), size=(16, 16), cfg=cfg), "tiles, as HyperTile makes them, and references are seen as "
            "a whole; take HyperTile off the model")
