"""Inputs that no reference can be made of, for every system: told in one sentence, with what came, what was expected and what to do."""
from types import SimpleNamespace

import pytest
import torch
import tryon
from comfy.nested_tensor import NestedTensor
from harness import model, sample
from refusing import FLUX, LOST, at_the_node, of_every_system, one, refused, text_for
from template_files import base, image_weights, lora_weights, scalar_weights, template
from test_easycontrol import adapter

from pack.core.reference.bank import Bank
from pack.core.reference.fastfit_checkpoint import load_fastfit
from pack.core.reference.handle import with_references
from pack.core.reference.latents import Run as LatentsRun
from pack.core.reference.latents import Settings, attach_reference_latents
from pack.core.reference.run import Keeping, Run
from pack.nodes import references as reference_nodes
from pack.nodes.easycontrol import EasyControlCondition
from pack.nodes.fastfit import FastFitGarment, FastFitPasteBack, FastFitPerson
from pack.nodes.references import CombineReferenceCache, LoadReferenceCache
from pack.nodes.template_carriers import TemplateLora, TemplateText
from pack.nodes.templates import TemplateImage, TemplateLoader, TemplateScalar
from testbed import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def handles(folder):
    return of_every_system(folder)


# Wrong class, kind, slot.

class Vae:
    """8 pixels to a latent one."""

    def __init__(self, channels=4, value=0.5, frames=False):
        self.channels, self.value, self.frames = channels, value, frames

    def encode(self, pixels):
        shape = (len(pixels), self.channels, *((1,) if self.frames else ()), pixels.shape[1] // 8, pixels.shape[2] // 8)
        return torch.full(shape, self.value)


PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(1, 64, 64)


def by_slots(*slots):
    """A condition for each of these slots of an adapter that has two."""
    two, handle = adapter(FLUX, slots=2), None
    for slot in slots:
        handle, = EasyControlCondition.execute(two, PICTURE, Vae(16), slot=slot, reference=handle).args
    return handle


def few_classes():
    return tryon.fastfit(**{"class_embedding.weight": tryon.TENSORS["class_embedding.weight"][:3]})


CLASSES = {
    "a garment": (lambda folder: FastFitGarment.execute(PICTURE, "hat", Vae()), "the class of a garment is 'hat'; choose one of upper, lower"),
    "a garment that the checkpoint does not know": (
        lambda folder: at_the_node(few_classes(), one(tryon.garment(label="bag"))), "knows the classes upper, lower, overall and a reference is of class bag"),
    "a kind of condition": (lambda folder: EasyControlCondition.execute(adapter(FLUX), PICTURE, Vae(16), kind="style"), "kind is 'style'; choose one of"),
    "a template in another node": (lambda folder: TemplateScalar.execute(template(folder, image_weights(), "edit")), "came into Template (scalar); connect"),
    "a template in the node of pictures": (
        lambda folder: TemplateImage.execute(template(folder, lora_weights(), "lora"), tiny.conditioning("flux2", 1)), "connect it to Template (LoRA)"),
    "a template in the node of LoRAs": (
        lambda folder: TemplateLora.execute(base(), template(folder, scalar_weights(), "bright")), "connect it to Template (scalar)"),
    "a condition of the second slot of an adapter of one": (
        lambda folder: EasyControlCondition.execute(adapter(FLUX), PICTURE, Vae(16), slot=1), "slot 1 was asked of random, which has 1, counted from 0; give"),
    "more conditions than slots": (lambda folder: by_slots(0, 1, 2), "slot 2 was asked of random, which has 2, counted from 0; give every condition a slot"),
    "a LoRA that a bank has not": (
        lambda folder: TemplateLora.execute(base(), template(folder, lora_weights(count=2), "bank"), ids="2"), "the LoRAs to take are '2'; expected numbers"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_wrong_class_kind_or_slot(folder, case):
    call, said = CLASSES[case]
    refused(lambda: call(folder), said)


def test_as_many_conditions_as_slots_are_taken():
    assert [reference.recipe.slot for reference in by_slots(0, 1).references] == [0, 1]


# What comes from other nodes.

def easycontrol(image=None, vae=None, latent=None, **more):
    return EasyControlCondition.execute(adapter(FLUX), image, vae, None if latent is None else {"samples": latent}, **more)


def image_template(folder, **inputs):
    return TemplateImage.execute(template(folder, image_weights(), "edit"), inputs.pop("positive", tiny.conditioning("flux2", 11)), **inputs)


def nested():
    return NestedTensor([torch.zeros(1, 16, 8, 8), torch.zeros(1, 4, 8, 8)])


THREE = "of shape [64, 64, 3] and [images, height, width, 3] was expected, none of them 0; connect an IMAGE"
NUMBERS = "has values that are no numbers, which would make the whole picture so; mend what made it"
INPUTS = {
    "EasyControl: a video latent": (lambda f: easycontrol(latent=torch.zeros(1, 16, 3, 8, 8)), "[1, 16, 3, 8, 8], as a video has it, and [pictures"),
    "EasyControl: several tensors in one": (lambda f: easycontrol(latent=nested()), "is several tensors in one, as video with sound, and [pictures"),
    "EasyControl: a latent of no height": (lambda f: easycontrol(latent=torch.zeros(1, 16, 0, 8)), "is of shape [1, 16, 0, 8] and [pictures, channels, height"),
    "EasyControl: a latent without samples": (
        lambda f: EasyControlCondition.execute(adapter(FLUX), latent={"noise_mask": MASK}), "the latent holds noise_mask and 'samples' was expected; connect"),
    "EasyControl: no latent": (lambda f: EasyControlCondition.execute(adapter(FLUX), latent=MASK), "the latent is a Tensor and 'samples' was expected"),
    "EasyControl: a latent that is no number": (lambda f: easycontrol(latent=torch.full((1, 16, 8, 8), LOST)), NUMBERS),
    "EasyControl: a VAE that gives no number": (lambda f: easycontrol(PICTURE, Vae(16, LOST)), NUMBERS),
    "EasyControl: the VAE of a video model": (lambda f: easycontrol(PICTURE, Vae(16, frames=True)), "as a video has it, and [pictures, 16"),
    "EasyControl: a latent of SD": (
        lambda f: easycontrol(latent=torch.zeros(1, 4, 8, 8)), "has 4 channels and 16 were expected; encode the picture with FLUX's"),
    "EasyControl: neither image nor latent": (lambda f: easycontrol(), "neither image nor latent came; connect one of them"),
    "EasyControl: both image and latent": (
        lambda f: easycontrol(PICTURE, Vae(16), torch.zeros(1, 16, 8, 8)), "both image and latent came; connect one of them"),
    "EasyControl: an unknown padding": (lambda f: easycontrol(PICTURE, Vae(16), padding="pink"), "padding is 'pink'; choose one of gray, black, white"),
    "Combine: nothing": (lambda f: CombineReferenceCache.execute(one(tryon.garment()), None), "second is a NoneType and references were expected; connect"),
    "Combine: nothing before": (
        lambda f: CombineReferenceCache.execute(None, one(tryon.garment())), "first is a NoneType and references were expected; connect"),
    "Apply: nothing": (lambda f: at_the_node(tryon.fastfit(), None), "reference is a NoneType and references were expected; connect"),
    "EasyControl: an image of 3 dimensions": (lambda f: easycontrol(PICTURE[0], Vae(16)), THREE),
    "EasyControl: an image of no height": (lambda f: easycontrol(PICTURE[:, :0], Vae(16)), "the image is of shape [1, 0, 64, 3] and [images"),
    "EasyControl: no image in the batch": (lambda f: easycontrol(PICTURE[:0], Vae(16), kind="subject"), "the image is of shape [0, 64, 64, 3] and [images"),
    "EasyControl: half a slot": (lambda f: easycontrol(PICTURE, Vae(16), slot=0.5), "slot is 0.5; it must be a whole number between 0 and 15"),
    "EasyControl: half a pixel": (lambda f: easycontrol(PICTURE, Vae(16), size=512.5), "size is 512.5; it must be a whole number between 64 and 1024"),
    "FastFit: an image of 3 dimensions": (lambda f: FastFitGarment.execute(PICTURE[0], "upper", Vae()), THREE),
    "FastFit: an image of no height": (lambda f: FastFitGarment.execute(PICTURE[:, :0], "upper", Vae()), "is of shape [1, 0, 64, 3] and [images"),
    "FastFit: a garment of 8 pixels": (lambda f: FastFitGarment.execute(PICTURE, "upper", Vae(), height=8), "a picture of 6 x 8 pixels came and the VAE"),
    "FastFit: a garment of 4 pixels": (lambda f: FastFitGarment.execute(PICTURE[:, :4], "upper", Vae(), height=0), "a picture of 64 x 4 pixels came and the"),
    "FastFit: a garment that the model halves away": (
        lambda f: at_the_node(tryon.fastfit(), FastFitGarment.execute(PICTURE[:, :8, :8], "upper", Vae(), height=0).args[0]), "a garment of 8 x 8 pixels came"),
    "FastFit: a garment that is no number": (lambda f: FastFitGarment.execute(PICTURE, "upper", Vae(value=LOST)), NUMBERS),
    "FastFit: a person that is no number": (lambda f: FastFitPerson.execute(PICTURE, MASK, Vae(value=LOST)), NUMBERS),
    "FastFit: a person of 3 dimensions": (lambda f: FastFitPerson.execute(PICTURE[0], MASK, Vae()), THREE),
    "FastFit: a pose of 3 dimensions": (lambda f: FastFitPerson.execute(PICTURE, MASK, Vae(), PICTURE[0]), "the pose is of shape [64, 64, 3] and [images"),
    "FastFit: a mask of no size": (lambda f: FastFitPerson.execute(PICTURE, torch.zeros(1, 0, 0), Vae()), "the mask is of shape [1, 0, 0] and [masks"),
    "FastFit: no mask": (lambda f: FastFitPerson.execute(PICTURE, torch.zeros(0, 64, 64), Vae()), "the mask is of shape [0, 64, 64] and [masks"),
    "FastFit: a mask of no numbers": (
        lambda f: FastFitPerson.execute(PICTURE, MASK * LOST, Vae()), "the mask has values that are no numbers; mend what made it"),
    "FastFit: a mask of no numbers for the paste": (lambda f: FastFitPasteBack.execute(PICTURE, PICTURE, MASK * LOST), "the mask has values that are no num"),
    "FastFit: an empty mask": (
        lambda f: FastFitPerson.execute(PICTURE, MASK * 0, Vae()), "the mask marks nothing of the person, or less than 8 x 8 pixels, so"),
    "FastFit: weights of an unknown type": (lambda f: load_fastfit("x.safetensors", "int3"), "weight_dtype is 'int3'; choose one of default, fp8_e4m3fn"),
    "template: weights of an unknown type": (lambda f: TemplateLoader.execute("x", "int3"), "weight_dtype is 'int3'; choose one of default, fp8_e4m3fn"),
    "FastFit: a mask of no size for the paste": (lambda f: FastFitPasteBack.execute(PICTURE, PICTURE, torch.zeros(1, 0, 8)), "the mask is of shape [1, 0, 8]"),
    "FastFit: a result of 3 dimensions": (lambda f: FastFitPasteBack.execute(PICTURE[0], PICTURE, MASK), "the result is of shape [64, 64, 3] and [images"),
    "template: a video latent": (lambda f: image_template(f, latent={"samples": torch.zeros(1, 128, 2, 4, 4)}), "as a video has it, and [pictures, channels"),
    "template: a latent without samples": (lambda f: image_template(f, latent={}), "the latent holds nothing and 'samples' was expected; connect a LATENT"),
    "template: a latent of another VAE": (lambda f: image_template(f, latent={"samples": torch.zeros(1, 16, 4, 4)}), "the latent has 16 channels and 128 were"),
    "template: a latent that is no number": (lambda f: image_template(f, latent={"samples": torch.full((1, 128, 4, 4), LOST)}), NUMBERS),
    "template: an image of 3 dimensions": (lambda f: image_template(f, image=PICTURE[0], vae=Vae(128)), THREE),
    "template: an image of no width": (lambda f: image_template(f, image=PICTURE[:, :, :0], vae=Vae(128)), "is of shape [1, 64, 0, 3] and [images"),
    "template: an image smaller than a latent pixel": (
        lambda f: image_template(f, image=PICTURE[:, :4], vae=Vae(128)), "is of shape [1, 128, 0, 8] and [pictures, 128, height, width] was expected"),
    "template: the text of another encoder": (
        lambda f: image_template(f, positive=[[torch.zeros(1, 7, 20), {}]], latent={"samples": torch.zeros(1, 128, 4, 4)}),
        "a prompt of 20 channels came and edit.safetensors reads 16; encode the prompt with FLUX.2 klein's own text encoder"),
    "template: the text of another encoder behind a prompt": (
        lambda f: TemplateText.execute([[torch.zeros(1, 7, 20), {}]], template(f, {"text_embedding": torch.zeros(3, 16)}, "words")), "has text of 16 channels"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_what_another_node_got_wrong(folder, case):
    call, said = INPUTS[case]
    refused(lambda: call(folder), said)


def test_a_reference_latent_that_is_no_number_is_told():
    run = LatentsRun(Settings("exact"), SimpleNamespace(model=model("flux2").model))
    run.prepare({"positive": [{"reference_latents": [torch.full((1, 128, 4, 4), LOST)]}]}, {}, (1, 128, 8, 8))
    assert "has values that are no numbers; mend what made it" in run.record.line() and not run.record.served


@pytest.mark.parametrize("mode", ["exact", "freeze"])
@pytest.mark.parametrize(("name", "channels", "wanted"), [("flux2", 16, 128), ("flux", 4, 16)])
def test_a_reference_latent_of_another_vae(mode, name, channels, wanted):
    records, latents = [], [tryon.drawn(31, 1, channels, 8, 6)]
    cached = attach_reference_latents(model(name), Settings(mode), records.append)
    conds = {side: tiny.conditioning(name, seed, reference_latents=latents) for side, seed in (("positive", 11), ("negative", 12))}
    said = f"a reference latent has {channels} channels and {type(model(name).model).__name__} takes {wanted};"
    refused(lambda: sample(cached, name, steps=2, **conds), said)
    assert "out of the sequence" not in records[0].line() and said in records[0].line()


def test_a_load_where_nothing_is_saved_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_nodes, "references_folder", lambda: tmp_path)
    refused(lambda: LoadReferenceCache.execute(reference_nodes.NONE_SAVED), "no reference is saved yet; save one with Save Reference Cache first")


OUTFITS = {("overall", "upper"): True, ("overall", "lower", "shoe"): True, ("overall", "shoe", "bag"): False, ("upper", "lower"): False}


@pytest.mark.parametrize("labels", OUTFITS)
def test_an_outfit_that_the_model_was_not_trained_with_is_told(labels):
    run = Run(Keeping(), Bank(), tryon.fastfit())
    run.claim({"positive": [more for _, more in with_references(text_for(None), tryon.handle(*(tryon.garment(i, label) for i, label in enumerate(labels))))]})
    assert ("is no outfit that FastFit was trained with" in run.record.line()) is OUTFITS[labels]


SPANS = {
    "EasyControl": lambda folder, **span: easycontrol(PICTURE, Vae(16), **span),
    "FastFit": lambda folder, **span: FastFitGarment.execute(PICTURE, "upper", Vae(), **span),
    "template of numbers": lambda folder, **span: TemplateScalar.execute(template(folder, scalar_weights(), "bright"), **span),
    "template of pictures": lambda folder, **span: image_template(folder, latent={"samples": torch.zeros(1, 128, 4, 4)}, **span),
}


@pytest.mark.parametrize("system", [*SPANS, "saved"])
def test_a_start_behind_the_end_is_refused_and_an_empty_span_is_not(folder, handles, system, monkeypatch):
    monkeypatch.setattr(reference_nodes, "references_folder", lambda: folder)
    made = SPANS.get(system, lambda folder, **span: LoadReferenceCache.execute("saved", **span))
    refused(lambda: made(folder, start_percent=0.6, end_percent=0.5), "start_percent is 0.6 and end_percent 0.5; the start must not lie behind the end")
    with torch.inference_mode():
        (reference,) = made(folder, start_percent=0.5, end_percent=0.5).args[0].references
    assert not reference.acts
