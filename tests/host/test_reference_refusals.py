"""What no reference can be made of or used with, for every system: told in one sentence, with what came, what was expected and what to do."""
import copy
import tracemalloc
from functools import partial
from types import SimpleNamespace

import folder_paths
import pytest
import torch
import tryon
from comfy.nested_tensor import NestedTensor
from comfy_extras.nodes_hypertile import HyperTile
from harness import model, sample
from safetensors import safe_open
from safetensors.torch import save_file
from template_files import BLOCKS, base, image_weights, lora_weights, scalar_weights, template
from test_easycontrol import adapter, condition
from torch import nn

from pack.core.reference.bank import Bank
from pack.core.reference.fastfit_checkpoint import build, load_fastfit
from pack.core.reference.files import read, write
from pack.core.reference.handle import Handle, Reference, with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.inspect import stored
from pack.core.reference.latents import Run as LatentsRun
from pack.core.reference.latents import Settings, attach_reference_latents
from pack.core.reference.ready import Ready
from pack.core.reference.run import Keeping, Run
from pack.core.reference.templates.lora import applied, merged
from pack.core.reference.templates.merge import referred
from pack.nodes import references as reference_nodes
from pack.nodes.easycontrol import EasyControlCondition, EasyControlLoader
from pack.nodes.fastfit import FastFitGarment, FastFitLoader, FastFitPasteBack, FastFitPerson
from pack.nodes.references import ApplyReferenceCache, CombineReferenceCache, LoadReferenceCache
from pack.nodes.template_carriers import TemplateLora, TemplateText
from pack.nodes.templates import TemplateImage, TemplateLoader, TemplateScalar
from testbed import tiny, tiny_fastfit

FLUX = model("flux").model.diffusion_model
LOST = float("nan")


def refused(call, said: str) -> None:
    with pytest.raises(ValueError) as caught, torch.inference_mode():
        call()
    sentence = str(caught.value)
    assert said in sentence, sentence
    assert "\n" not in sentence and 40 < len(sentence) < 450 and "; " in sentence, sentence


def one(recipe) -> Handle:
    return Handle((Reference(recipe),))


def text_for(patcher) -> list:
    return [[torch.zeros(1, 4, 16), {"pooled_output": torch.zeros(1, 16)}]]


def at_the_node(patcher, handle):
    ApplyReferenceCache.execute(patcher, text_for(patcher), text_for(patcher), handle)


def at_the_sampler(patcher, handle):
    conds = {"positive": [more for _, more in with_references(text_for(patcher), handle)]}
    Run(Keeping(), Bank(), patcher).claim(conds)


DOORS = (at_the_node, at_the_sampler)


def with_network(network):
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=network))


def flux_of(**size):
    return with_network(tiny.flux(tiny.comfy.ops.disable_weight_init, **size))


def fill_variant():
    net = copy.copy(FLUX)
    net.in_channels = 384
    return with_network(net)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def handles(folder) -> dict[str, Handle]:
    """A reference of every system."""
    attached, single = attach_references(model("flux"), bank=Bank()), one(condition(FLUX))
    sample(attached, "flux", cfg=1.0, steps=1, positive=with_references(tiny.conditioning("flux", 11), single))
    write(folder, "saved", stored(attached, single))
    bank = Bank()
    tryon.by_pack(tryon.fastfit(), tryon.handle(tryon.garment()), bank=bank)
    return {
        "EasyControl": single, "FastFit": one(tryon.garment()), "template": referred(template(folder, scalar_weights(), "bright").entry((0.7,))),
        "saved": one(read(folder, "saved")[0]), "saved garment": one(Ready(next(iter(bank.entries.values())), "unet")),
    }


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


# Wrong, damaged and truncated files.

def adapter_tensors() -> dict:
    return {f"{'single_' * (block[0] == 's')}transformer_blocks.{block.split('.')[1]}.attn.processor.{part}_loras.0.{half}.weight": tensor.contiguous()
            for block, parts in adapter(FLUX).slots[0].items() for part, pair in parts.items() for half, tensor in zip(("down", "up"), pair, strict=True)}


PLAIN_LORA = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 128), "transformer.transformer_blocks.0.attn.to_q.lora_B.weight":
              torch.zeros(128, 4)}
def changed(tensors: dict, end: str, change) -> dict:
    """With the first tensor of such a name changed."""
    key = next(key for key in tensors if key.endswith(end))
    return {**tensors, key: change(tensors[key].clone()).contiguous()}


def lost(tensor):
    return tensor.index_fill_(0, torch.tensor([0]), LOST)


def numbered(tensors: dict, slot: str) -> dict:
    """As of another slot."""
    return {key.replace("_loras.0.", f"_loras.{slot}."): tensor for key, tensor in tensors.items()}


def whole(tensors: dict) -> dict:
    """Of whole numbers."""
    return {key: tensor.to(torch.int32) for key, tensor in tensors.items()}


def with_alpha(alpha) -> dict:
    return {**lora_weights(layers=["transformer_blocks.0.attn.to_q"]), "transformer_blocks.0.attn.to_q.alpha": alpha}


WHOLE = {"EasyControl": adapter_tensors, "FastFit": tiny_fastfit.tensors, "template": scalar_weights, "saved": lambda: None}
KINDS = {"EasyControl": "loras", "FastFit": "diffusion_models", "template": "templates"}
NODES = {"EasyControl": EasyControlLoader, "FastFit": FastFitLoader, "template": TemplateLoader}


@pytest.fixture
def place(tmp_path, monkeypatch, handles, folder):
    """A file of a system in the folder of its loader, and a call that loads it."""
    def put(system: str, tensors: dict | None = None, raw: bytes | None = None):
        path = tmp_path / "x.safetensors"
        if raw is None and system == "saved" and tensors is None:
            raw = (folder / "saved.safetensors").read_bytes()
        if raw is None:
            save_file(tensors, path)
        else:
            path.write_bytes(raw)
        if system == "saved":
            monkeypatch.setattr(reference_nodes, "references_folder", lambda: tmp_path)
            return path, lambda: LoadReferenceCache.execute("x")
        monkeypatch.setitem(folder_paths.folder_names_and_paths, KINDS[system], ([str(tmp_path)], folder_paths.supported_pt_extensions))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        return path, lambda: NODES[system].execute("x.safetensors")

    return put


def cut_down(tensors: dict, end: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


FILES = {
    ("EasyControl", "a plain LoRA"): (PLAIN_LORA, "which no EasyControl adapter has; choose a file such as canny.safetensors of EasyControl"),
    ("EasyControl", "one for Anima"): ({"cond_lora_qkv.0.lora_down.weight": torch.zeros(4, 8)}, "is an EasyControl adapter for Anima or Cosmos; expected"),
    ("EasyControl", "a FastFit UNet"): (tiny_fastfit.tensors(), "which no EasyControl adapter has; choose a file"),
    ("EasyControl", "without a half"): (cut_down(adapter_tensors(), "k_loras.0.up.weight"), "has only the down half of k in block"),
    ("FastFit", "SD 1.5"): ({**tiny_fastfit.tensors(), "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, 768)},
                            "is a UNet with cross-attention, as SD 1.5 has it, and FastFit's has none; choose unet/"),
    ("FastFit", "a LoRA"): (PLAIN_LORA, "has no conv_in.weight, which a UNet of a diffusers folder has"),
    ("template", "one for Qwen-Image"): ({"proj_k.block_0.positional_embedding": torch.zeros(4, 128)}, "is a template for Qwen-Image"),
    ("template", "an unknown one"): ({"image_encoder.weight": torch.zeros(2)}, "its keys are 'image_encoder.weight'; load the model.safetensors of"),
    ("template", "not whole"): ({k: v for k, v in scalar_weights().items() if "single_1" not in k}, "leaves some out; it is not whole, download it again"),
    ("EasyControl", "of whole numbers"): (whole(adapter_tensors()), "of type int32 where weights are of floating point; download it again"),
    ("EasyControl", "of no numbers"): (
        changed(adapter_tensors(), "k_loras.0.up.weight", lost), "that are no numbers, which would make the whole picture so; down"),
    ("EasyControl", "without slot 0"): (numbered(adapter_tensors(), "1"), "has 1 slot and numbers them up to 1; expected slots from 0 on, none left out; down"),
    ("EasyControl", "of a slot of millions"): (numbered(adapter_tensors(), "20000000"), "has 1 slot and numbers them up to 20000000; expected slots from 0"),
    ("EasyControl", "of a slot of many digits"): (numbered(adapter_tensors(), "9" * 30), "which no EasyControl adapter has; choose a file"),
    ("FastFit", "of whole numbers"): (whole(tiny_fastfit.tensors()), "of type int32 where weights are of floating point; choose unet/"),
    ("FastFit", "with a first convolution of 1 dimension"): (
        changed(tiny_fastfit.tensors(), "conv_in.weight", torch.flatten), "has conv_in.weight of shape [2592] where 4 dimensions, none of them 0, belong; "),
    ("FastFit", "with a first convolution of no rows"): (
        changed(tiny_fastfit.tensors(), "conv_in.weight", lambda weight: weight[:0]), "has conv_in.weight of shape [0, 9, 3, 3] where 4 dimensions, none"),
    ("FastFit", "with a first convolution of odd rows"): (
        changed(tiny_fastfit.tensors(), "conv_in.weight", lambda weight: weight[:31]), "has conv_in.weight of 31 rows, which 32 groups of a norm cannot share"),
    ("FastFit", "with classes of no dimension"): (
        changed(tiny_fastfit.tensors(), "class_embedding.weight", lambda weight: weight[0, 0]), "has class_embedding.weight of shape [] where 2 dimensions"),
    ("FastFit", "with a block of no dimension"): (
        changed(tiny_fastfit.tensors(), "down_blocks.0.resnets.0.conv1.weight", lambda weight: weight[0, 0, 0, 0]), "resnets.0.conv1.weight of shape [], wh"),
    ("FastFit", "with a block of no number"): ({**tiny_fastfit.tensors(), "down_blocks.x.resnets.0.conv1.weight": torch.zeros(32, 32, 3, 3)},
                                               "has the key down_blocks.x.resnets.0.conv1.weight, which FastFit's UNet does not have; choose unet/"),
    ("template", "of whole numbers"): (whole(scalar_weights()), "has tensors of type I32 where a template's are F64, F32, F16, BF16"),
    ("template", "of pictures and whole numbers"): (whole(image_weights()), "has tensors of type I32 where a template's are F64, F32, F16, BF16"),
    ("template", "of no tokens"): (scalar_weights(tokens=0), "is of shape [0, 256], which holds nothing; download it again"),
    ("template", "of LoRAs of no rank"): (lora_weights(rank=0), "which holds nothing; download it again"),
    ("template", "of LoRAs with a matrix for alpha"): (
        with_alpha(torch.ones(3, 3)), "alpha of shape [3, 3]; expected one number, or one for each LoRA of a bank"),
    ("saved", "an adapter"): (adapter_tensors(), "the format is 'None', expected 'reprise.reference'; save it again"),
}


@pytest.mark.parametrize("case", FILES, ids=", ".join)
def test_a_wrong_file(place, case):
    tensors, said = FILES[case]
    _, load = place(case[0], tensors)
    refused(load, said)


def test_a_slot_of_millions_takes_no_memory(place):
    _, load = place("EasyControl", numbered(adapter_tensors(), "20000000"))
    tracemalloc.start()
    refused(load, "numbers them up to 20000000")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 25     # the file is read by pieces of half that


USES = {
    "scalar": (scalar_weights, "positional_embedding", lambda made: made.entry((0.5,))),
    "constant": (lambda: {key: tensor for key, tensor in scalar_weights().items() if "positional" in key}, "positional_embedding", lambda made: made.entry()),
    "LoRA": (lora_weights, "lora_B.default.weight", lambda made: made.loras([0])),
    "image": (image_weights, "img_to_qkv.weight", lambda made: made.patcher),
    "text": (lambda: {"text_embedding": torch.zeros(3, 16)}, "text_embedding", lambda made: made.embedding()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", USES)
def test_a_template_of_no_numbers_is_refused_where_it_is_read(tmp_path, kind, dtype):
    made, end, use = USES[kind]
    tensors = {key: tensor.to(dtype) for key, tensor in changed(made(), end, lost).items()}
    refused(lambda: use(template(tmp_path, tensors, "broken")), "that are no numbers, which would make the whole picture so; download it again")


@pytest.mark.parametrize("part", [".k", ".v", ".ids"])
def test_a_saved_reference_of_no_numbers(place, folder, part):
    with safe_open(folder / "saved.safetensors", framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()     # noqa: SIM118 - no mapping
    path, load = place("saved", {})
    save_file(changed(tensors, part, lost), path, metadata)
    refused(load, "of entry 0 has values that are no numbers; save it again")


def garbage(raw: bytes) -> bytes:
    return raw[:8] + bytes(byte ^ 0x5A for byte in raw[8:200]) + raw[200:]


DAMAGE = {
    "empty": lambda raw: b"", "4 bytes": lambda raw: raw[:4], "within the header": lambda raw: raw[:60], "half": lambda raw: raw[:len(raw) // 2],
    "all but one": lambda raw: raw[:-1], "a header that is none": garbage, "a header of exabytes": lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:],
    "a pickle": lambda raw: b"\x80\x04\x95" + raw[:200],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("system", WHOLE)
def test_a_damaged_or_truncated_file(place, system, damage):
    path, load = place(system, WHOLE[system]())
    load()
    raw = path.read_bytes()
    _, load = place(system, raw=DAMAGE[damage](raw))
    refused(load, " again")


@pytest.mark.parametrize("system", NODES)
def test_a_file_that_is_not_in_the_menu(place, system):
    place(system, WHOLE[system]())
    refused(lambda: NODES[system].execute("../gone.safetensors"), "'../gone.safetensors'")


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
