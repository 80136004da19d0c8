"""Files that no reference can be made of, for every system: told in one sentence, with what came, what was expected and what to do."""
import tracemalloc

import folder_paths
import pytest
import torch
from refusing import FLUX, LOST, of_every_system, refused
from safetensors import safe_open
from safetensors.torch import save_file
from template_files import image_weights, lora_weights, scalar_weights, template
from test_easycontrol import adapter

from pack.nodes import references as reference_nodes
from pack.nodes.easycontrol import EasyControlLoader
from pack.nodes.fastfit import FastFitLoader
from pack.nodes.references import LoadReferenceCache
from pack.nodes.templates import TemplateLoader
from testbed import tiny_fastfit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def handles(folder):
    return of_every_system(folder)


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
