"""How a template's kind is told from its tensors, what is refused and in which words, and the nodes."""
import inspect

import folder_paths
import pytest
import torch
from comfy_api.internal import make_locked_method_func
from template_files import BLOCKS, DOUBLES, SINGLES, WIDTH, base, image_weights, lora_weights, random, scalar_weights, template, write
from test_templates import sampled

from pack.core.reference.handle import with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.templates import KINDS, WrongTemplate
from pack.core.reference.templates.constant import Constant
from pack.core.reference.templates.file import opened
from pack.core.reference.templates.folder import find, names
from pack.nodes import template_carriers, templates
from pack.nodes._api import io
from testbed import tiny

NODES = [*templates.NODES, *template_carriers.NODES]


def constant_weights(tokens: int = 5) -> dict:
    generator = torch.Generator().manual_seed(7)
    return {f"proj_{part}.{block}.positional_embedding": random(tokens, WIDTH, generator=generator) for part in "kv" for block in BLOCKS}


def cache_weights(tokens: int = 5) -> dict:
    return {f"kv_cache.{key.split('.')[1]}.{key[5]}": tensor.view(1, tokens, -1, 128) for key, tensor in constant_weights(tokens).items()}


FILES = {"scalar": scalar_weights(), "constant": constant_weights(), "image": image_weights(), "LoRA": lora_weights(count=3),
         "text": {"extra_text_embedding": torch.zeros(4, 16)}}


@pytest.mark.parametrize("kind", FILES)
def test_a_template_s_kind_is_told_by_its_tensors_and_no_other_kind_takes_it(tmp_path, kind):
    assert set(FILES) == set(KINDS)
    found = template(tmp_path, FILES[kind])
    assert type(found) is KINDS[kind]
    assert [name for name, other in KINDS.items() if other.recognises(found.file.shapes)] == [kind]


def test_sizes_come_from_the_shapes(tmp_path):
    scalar = template(tmp_path, scalar_weights(values=3, tokens=9, width=512, blocks=BLOCKS[:3]))
    assert (scalar.values, scalar.tokens, scalar.width, scalar.blocks) == (3, 9, 512, tuple(BLOCKS[:3]))
    image = template(tmp_path, image_weights(depth=1, depth_single=12), "image")
    assert image.depth == (1, 12) and image.width == WIDTH
    assert template(tmp_path, image_weights(), "other").depth == (DOUBLES, SINGLES)


@pytest.mark.parametrize("weights", [constant_weights(), cache_weights()])
def test_a_constant_template_s_tokens_are_cut_into_heads(tmp_path, weights):
    constant = template(tmp_path, weights)
    assert isinstance(constant, Constant) and constant.values == 0
    k, v = constant.entry().blocks["single.1"]
    for part, tensor in (("k", k), ("v", v)):
        rows = constant_weights()[f"proj_{part}.single_1.positional_embedding"]
        assert tensor.shape == (1, 2, 5, 128) and torch.equal(tensor[0, 1, 3], rows[3, 128:])


def without(weights: dict, key: str) -> dict:
    assert key in weights
    return {name: tensor for name, tensor in weights.items() if name != key}


BROKEN = {
    "a scalar one without a bias": (without(scalar_weights(), "proj_v.single_1.prefer_value_embedder.2.bias"),
                                    "has no proj_v.single_1.prefer_value_embedder.2.bias; it is not whole"),
    "a scalar one without a block": ({k: v for k, v in scalar_weights().items() if "single_1" not in k}, "leaves some out; it is not whole"),
    "a scalar one of a strange width": (scalar_weights(width=100), "width 100, which is no number of heads of 128"),
    "a scalar one of too many values": (scalar_weights(values=4), "reads 1024 numbers where a template of 1 to 3 values"),
    "a scalar one with more": ({**scalar_weights(), "gate.weight": torch.zeros(2)}, r"keys that its kind of template has not \('gate.weight'\)"),
    "a scalar one with another shape": ({**scalar_weights(), "proj_k.double_1.positional_embedding": torch.zeros(7, WIDTH)},
                                        r"positional_embedding is \[7, 256\] where \[6, 256\] belongs"),
    "a constant one without a half": (without(constant_weights(), "proj_v.double_0.positional_embedding"), "has no proj_v.double_0.positional_embedding"),
    "an image one without a matrix": (without(image_weights(), "single_transformer_blocks.2.to_out.weight"),
                                      "has no matrix single_transformer_blocks.2.to_out.weight; it is not whole"),
    "an image one of another build": ({**image_weights(), "transformer_blocks.1.txt_ff.linear_in.weight": torch.zeros(8 * WIDTH, WIDTH)},
                                      r"txt_ff.linear_in.weight is \[2048, 256\] where \[1536, 256\] belongs"),
    "an image one of a vector": ({**image_weights(), "img_embedder.weight": torch.zeros(WIDTH)}, "has no matrix img_embedder.weight"),
    "an image one with more": ({**image_weights(), "mask_embedder.weight": torch.zeros(2, 2)}, r"no image template known here has \('mask_embedder.weight'\)"),
    "an image one of more channels": ({**image_weights(), "img_embedder.weight": torch.zeros(WIDTH, 129)}, "reads 129 channels for a token where FLUX.2 has"),
    "a LoRA of one half": (without(lora_weights(), "transformer_blocks.0.attn.to_q.lora_A.default.weight"), "has only .* of transformer_blocks.0.attn.to_q"),
    "a LoRA of unequal ranks": ({"a.lora_A.weight": torch.zeros(2, 8), "a.lora_B.weight": torch.zeros(8, 3)}, r"halves of a are \[2, 8\] and \[8, 3\]"),
    "one for Qwen-Image": ({"proj_k.block_0.positional_embedding": torch.zeros(4, 128)}, "is a template for Qwen-Image"),
    "another network": ({"image_encoder.layer.0.weight": torch.zeros(2), "to_lora.weight": torch.zeros(2)},
                        "its keys are 'image_encoder.layer.0.weight', 'to_lora.weight'; load the model.safetensors of a Diffusion Template"),
    "a model of the host's": (tiny.weights("flux2")[0], "is no template that is known here .* and [0-9]+ more; load"),
    "nothing": ({}, "its keys are none"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_whole_template_is_refused_in_one_sentence(tmp_path, case):
    weights, said = BROKEN[case]
    with pytest.raises(WrongTemplate, match=said) as caught:
        template(tmp_path, weights)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_told(tmp_path, cut):
    path = write(tmp_path, scalar_weights())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="is (empty|truncated or no safetensors file).*; download"):
        opened(path, "t.safetensors")


def test_a_file_of_another_format_is_refused_unread(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="may run code when they are read; choose the template's model.safetensors"):
        opened(path, "model.ckpt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "templates", ([str(tmp_path)], set()))
    folder_paths.filename_list_cache.pop("templates", None)
    for name, weights in FILES.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, weights, "model")
        (tmp_path / name / "model.py").write_text("raise SystemExit('this is never run')")
    yield tmp_path
    folder_paths.filename_list_cache.pop("templates", None)


def execute(node, *args, **inputs):
    """The node as the host calls it: on a clone of its class that nothing may be written to."""
    named = inspect.signature(node.execute).bind(*args, **inputs).arguments
    with torch.inference_mode():
        return make_locked_method_func(node, "execute", node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}}))(**named).result


def load(kind: str):
    return execute(templates.TemplateLoader, f"{kind}/model.safetensors")[0]


def test_the_menu_has_the_weights_of_the_folder_and_no_code(folder):
    assert names() == sorted(f"{kind}/model.safetensors" for kind in FILES)
    schema = templates.TemplateLoader.GET_SCHEMA()
    assert schema.inputs[0].options == names()
    with pytest.raises(ValueError, match=r"no template '../model.safetensors' is in"):
        find("../model.safetensors")


def test_a_file_that_is_replaced_is_loaded_again(folder):
    name = "scalar/model.safetensors"
    before = templates.TemplateLoader.fingerprint_inputs(name=name)
    write(folder / "scalar", scalar_weights(tokens=8), "model")
    assert templates.TemplateLoader.fingerprint_inputs(name=name) != before and templates.TemplateLoader.fingerprint_inputs(name="gone") == ""


@pytest.mark.parametrize("node", NODES)
def test_a_node_s_schema_is_valid_and_its_defaults_are_python_s(node, folder):
    schema, parameters = node.GET_SCHEMA(), inspect.signature(node.execute).parameters
    assert schema.node_id.startswith("Reprise_Template") and schema.category == "reprise/references"
    assert [entry.id for entry in schema.inputs] == list(parameters) and all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
    for entry in schema.inputs:
        if getattr(entry, "default", None) is not None:
            assert entry.optional and parameters[entry.id].default == entry.default, entry.id


def test_a_template_in_the_wrong_node_is_told_the_right_one(folder):
    with pytest.raises(ValueError, match=r"of the kind 'image' and came into Template \(scalar\); connect it to Template \(image\)"):
        execute(templates.TemplateScalar, load("image"))
    with pytest.raises(ValueError, match=r"connect it to Template \(LoRA\)"):
        execute(templates.TemplateImage, load("LoRA"), tiny.conditioning("flux2", 1))


def test_the_scalar_node_gives_each_side_its_own_values(folder):
    template = load("scalar")
    (handle,) = execute(templates.TemplateScalar, template, 0.7, negative_value=0.4, weight=2.0, end_percent=0.5)
    (reference,), (other,) = handle.references, handle.other_side().references
    assert reference.recipe.entry.key == template.entry((0.7,)).key and other.recipe.entry.key == template.entry((0.4,)).key
    assert (reference.weight, reference.start, reference.end) == (other.weight, other.start, other.end) == (2.0, 0.0, 0.5)
    (joined,) = execute(templates.TemplateScalar, load("constant"), negative="none", reference=handle)
    assert len(joined.references) == 2 and len(joined.other_side().references) == 1
    with pytest.raises(ValueError, match="value is nan; it must lie between"):
        execute(templates.TemplateScalar, template, float("nan"))
    with pytest.raises(ValueError, match="^start_percent is 0.6 and end_percent 0.5; the start must not lie behind the end$"):
        execute(templates.TemplateScalar, template, start_percent=0.6, end_percent=0.5)


class Encoder:
    """Stands in for FLUX.2's VAE: 128 channels, 16 pixels to a side."""

    def encode(self, pixels):
        b, h, w, c = pixels.shape
        return pixels.view(b, h // 16, 16, w // 16, 16, c).permute(0, 2, 4, 5, 1, 3).reshape(b, -1, h // 16, w // 16)[:, :128]


def test_the_image_node_runs_the_template_on_pictures_and_prompts_and_the_model_samples_with_it(folder):
    pixels = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = tiny.conditioning("flux2", 11), tiny.conditioning("flux2", 12)
    latent = {"samples": torch.randn(1, 128, 2, 2, generator=torch.Generator().manual_seed(2))}
    (handle,) = execute(templates.TemplateImage, load("image"), positive, pixels, Encoder(), latent, negative)
    assert handle.layout == handle.other_side().layout and handle.references[0].recipe.tokens == 512 + 4 + 2 * 6
    template = load("image")
    pictures = [latent["samples"], *Encoder().encode(pixels).split(1)]
    with torch.inference_mode():
        assert handle.references[0].recipe.entry.key == template.entry(positive[0][0], pictures).key
        assert handle.other_side().references[0].recipe.entry.key == template.entry(negative[0][0], pictures).key
    model = base()
    got = sampled(attach_references(model), positive=with_references(positive, handle), negative=with_references(negative, handle.other_side()))
    assert torch.isfinite(got).all() and (got - sampled(model)).abs().max() > 1e-2
    (alone,) = execute(templates.TemplateImage, template, positive, latent=latent)
    assert not alone.other_side().references


def test_the_image_node_tells_what_it_lacks(folder):
    template, positive = load("image"), tiny.conditioning("flux2", 11)
    for inputs, said in (({}, "wants a picture"), ({"image": torch.zeros(1, 32, 32, 3)}, "no VAE to encode it"),
                         ({"latent": {"samples": torch.zeros(1, 16, 4, 4)}}, "encode the picture with FLUX.2's VAE")):
        with pytest.raises(ValueError, match=said):
            execute(templates.TemplateImage, template, positive, **inputs)
    with pytest.raises(ValueError, match="reads one prompt and 2 came"):
        execute(templates.TemplateImage, template, positive * 2, latent={"samples": torch.zeros(1, 128, 2, 2)})


def test_the_lora_and_text_nodes_hand_their_inputs_on(folder):
    model, positive = base(), tiny.conditioning("flux2", 11)
    got, same, none = execute(template_carriers.TemplateLora, model, load("LoRA"), positive, ids="0, 2", merge="mean", scale=2.0)
    assert same is positive and none is None and got is not model
    (key, patches), = [(key, entries) for key, entries in got.patches.items() if "img_attn.qkv" in str(key)]
    assert patches[0][0] == 2.0
    weights, name = FILES["LoRA"], "transformer_blocks.0.attn.to_q"
    wanted = sum(weights[f"{name}.lora_B.default.weight"][i] @ weights[f"{name}.lora_A.default.weight"][i] for i in (0, 2)) / 2
    torch.testing.assert_close(patches[0][1].weights[0] @ patches[0][1].weights[1], wanted)
    (conditioning,) = execute(template_carriers.TemplateText, positive, load("text"))
    assert conditioning[0][0].shape[1] == positive[0][0].shape[1] + 4
