"""Text encoders from GGUF files: the host's models under llama.cpp's names, as the gguf package maps them."""
from functools import cache

import comfy.sd
import comfy.utils
import folder_paths
import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from comfy.clip_model import CLIPTextModel
from comfy.text_encoders.llama import Qwen3_4B
from comfy.text_encoders.t5 import T5

from pack.core.quant import folders, text_encoder
from pack.core.quant.files import BadFile, open_file
from pack.core.quant.packed_ops import is_packed
from pack.nodes.gguf import GGUFTextEncoderLoader
from testbed.gguf_files import block, write
from testbed.gguf_files import encoded as encoded_blocks

# As narrow as the host's way to tell models lets them be: 24 blocks and 10240 rows for T5, 2560 channels for Qwen
T5_CONFIG = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 10240, "num_layers": 24, "vocab_size": 200, "dense_act_fn": "gelu_pytorch_tanh",
             "is_gated_act": True, "model_type": "t5"}
QWEN_CONFIG = {"num_hidden_layers": 3, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
CLIP_CONFIG = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 12, "hidden_act": "quick_gelu",
               "max_position_embeddings": 77, "eos_token_id": 49407, "vocab_size": 49408, "projection_dim": 64}
OPTIONS = {"t5xxl_model_config": T5_CONFIG, "qwen3_4b_model_config": QWEN_CONFIG}
KINDS = {
    "t5": (T5, T5_CONFIG, gguf.MODEL_ARCH.T5ENCODER, 24, "flux", "t5xxl"),
    "qwen": (Qwen3_4B, QWEN_CONFIG, gguf.MODEL_ARCH.QWEN3, 3, "lumina2", "qwen3_4b"),
}
STAYS = ("norm", "attn_rel_b")     # what llama.cpp leaves in single precision


@pytest.fixture(autouse=True)
def as_the_host_runs():
    with torch.inference_mode():
        yield


@cache
def tensors(name):
    """(llama.cpp's name, host's name) -> weights of a random model."""
    model, config, arch, depth, *_ = KINDS[name]
    names, chance = gguf.get_tensor_name_map(arch, depth), np.random.default_rng(4)
    shapes = {key: tuple(tensor.shape) for key, tensor in model(dict(config), torch.float32, "meta", comfy.ops.disable_weight_init).state_dict().items()}
    return {(names.get_name(key, (".weight", ".bias")), key): (chance.standard_normal(shape) / max(shape[-1], 1) ** 0.5 + (len(shape) == 1)).astype(np.float32)
            for key, shape in shapes.items()}


def typed(llama: str, x, type):
    if any(word in llama for word in STAYS) or x.ndim < 2:
        return x
    return (x, type if x.shape[1] % block(type) == 0 else "Q8_0")


@cache
def blocks_of(name, type):
    """llama.cpp's name -> what the file holds: floats, or (blocks, their type)."""
    made = {llama: typed(llama, x, type) for (llama, _), x in tensors(name).items()}
    return {llama: (encoded_blocks(*x), x[1]) if isinstance(x, tuple) else x for llama, x in made.items()}


def file(tmp_path, name, type="Q4_K", without=(), extra=(), architecture=None):
    kept = {llama: x for llama, x in blocks_of(name, type).items() if llama not in without}
    return write(tmp_path / f"{name}.gguf", {**kept, **dict(extra)}, architecture or gguf.MODEL_ARCH_NAMES[KINDS[name][2]])


def decoded(path, name):
    """The file's weights under the host's names, by the package alone."""
    at = {llama: host for llama, host in tensors(name)}
    return {at[tensor.name]: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist()))).copy())
            for tensor in gguf.GGUFReader(path).tensors if tensor.name in at}


def encoded(clip, part):
    model = getattr(clip.cond_stage_model, part)
    model.execution_device = torch.device("cpu")
    return model([[3, 7, 7, 150, 1, 0, 0, 0]])[0]


@pytest.mark.parametrize("type", ("Q4_K", "Q5_1"))
@pytest.mark.parametrize("name", KINDS)
def test_a_text_encoder_gives_what_its_unpacked_weights_give(name, type, tmp_path):
    path, (*_, kind, part) = file(tmp_path, name, type), KINDS[name]
    clip = text_encoder.load([str(path)], kind, options=OPTIONS)
    host = comfy.sd.load_text_encoder_state_dicts([decoded(path, name)], clip_type=comfy.sd.CLIPType[kind.upper()], model_options=dict(OPTIONS))
    got, wanted = encoded(clip, part), encoded(host, part)
    assert torch.equal(got, wanted) and float(got.std()) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_its_layers_stay_packed_in_memory(name, tmp_path):
    path = file(tmp_path, name)
    clip = text_encoder.load([str(path)], KINDS[name][4], options=OPTIONS)
    packed = [module for module in clip.cond_stage_model.modules() if is_packed(getattr(module, "weight", None))]
    floats = sum(x.nbytes for (llama, _), x in tensors(name).items() if not isinstance(typed(llama, x, "Q4_K"), tuple))
    assert len(packed) == sum(isinstance(typed(llama, x, "Q4_K"), tuple) for (llama, _), x in tensors(name).items())
    assert clip.patcher.model_size() < path.stat().st_size + 4 * floats + (1 << 20)


def test_two_encoders_load_together_and_again(tmp_path):
    path = file(tmp_path, "t5")
    keys = CLIPTextModel(CLIP_CONFIG, torch.float32, "meta", comfy.ops.disable_weight_init).state_dict()
    chance = torch.Generator().manual_seed(1)
    clip_l = {key: torch.randn(tensor.shape, generator=chance).half() * 0.1 for key, tensor in keys.items()}
    safetensors.torch.save_file(clip_l, tmp_path / "clip_l.safetensors")
    options = OPTIONS | {"model_config": dict(CLIP_CONFIG)}
    clip = text_encoder.load([str(path), str(tmp_path / "clip_l.safetensors")], "flux", options=options)
    host = comfy.sd.load_text_encoder_state_dicts([decoded(path, "t5"), dict(clip_l)], clip_type=comfy.sd.CLIPType.FLUX, model_options=dict(options))
    got, wanted = encoded(clip, "t5xxl"), encoded(host, "t5xxl")      # of two, the host casts T5's weights to half precision
    assert float((got - wanted).norm() / wanted.norm()) < 0.01
    tokens = [[49406, 5, 9, *[49407] * 74]]
    assert torch.equal(clip.cond_stage_model.clip_l(tokens)[1], host.cond_stage_model.clip_l(tokens)[1])
    assert clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.float16     # not blown up
    load, given = clip.patcher.cached_patcher_init
    again = load(*given, disable_dynamic=True)
    assert not again.is_dynamic() and again.model_size() == clip.patcher.model_size()


REFUSED = {
    "a block without a layer": (dict(name="t5", without=("enc.blk.3.ffn_up.weight",)), "lacks 1 tensors of a text encoder, the first is 'enc.blk.3.ffn_up'"),
    "no embedding": (dict(name="qwen", without=("token_embd.weight",)), "'token_embd'"),
    "a diffusion model": (dict(name="qwen", architecture="flux"), "Quantized Model Loader"),
    "another text model": (dict(name="qwen", architecture="llama"), "'llama'"),
    "a tensor of no such model": (dict(name="qwen", extra={"blk.0.ssm_a.weight": np.zeros((4, 32), np.float32)}), "blk.0.ssm_a.weight"),
    "a norm of whole numbers": (
        dict(name="qwen", extra={"blk.0.attn_norm.weight": np.ones(2560, np.int32)}), "'model.layers.0.input_layernorm.weight' holds int32"),
    "a layer of whole numbers": (
        dict(name="t5", extra={"enc.blk.2.attn_q.weight": np.ones((32, 32), np.int64)}), "'encoder.block.2.layer.0.SelfAttention.q.weight' holds int64"),
    "a scale that is no number": (
        dict(name="t5", extra={"enc.blk.2.attn_q.weight": (np.full((32, 34), 255, np.uint8), "Q8_0")}),
        "'enc.blk.2.attn_q.weight' is stored as Q8_0, and 32 of"),
    "umT5": (dict(name="t5", extra={"enc.blk.1.attn_rel_b.weight": np.zeros((32, 2), np.float32)}), "umT5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_such_encoder_is_refused_in_a_sentence(case, tmp_path):
    given, said = REFUSED[case]
    path = file(tmp_path, **given)
    with pytest.raises(BadFile) as caught:
        text_encoder.load([str(path)], "flux", options=OPTIONS)
    assert said in str(caught.value) and path.name in str(caught.value)


def test_what_an_encoder_does_not_need_is_left_in_the_file(tmp_path):
    extra = {"output.weight": np.zeros((300, 2560), np.float32), "rope_freqs.weight": np.zeros(32, np.float32)}
    assert text_encoder.state_dict(open_file(file(tmp_path, "qwen", extra=extra))).keys() == {host for _, host in tensors("qwen")}


def test_the_menu_shows_gguf_files_and_the_node_loads_them(tmp_path, monkeypatch):
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    path = file(folder, "qwen")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], folder_paths.supported_pt_extensions))
    folder_paths.filename_list_cache.pop("reprise_text_encoders", None)
    assert folders.model_files("text_encoders") == ["qwen.gguf"] and "qwen.gguf" not in folder_paths.get_filename_list("text_encoders")
    schema = GGUFTextEncoderLoader.define_schema()
    assert next(entry for entry in schema.inputs if entry.id == "text_encoder").options == ["qwen.gguf"]
    assert set(next(entry for entry in schema.inputs if entry.id == "type").options) == {kind.name.lower() for kind in comfy.sd.CLIPType}
    calls = []
    monkeypatch.setattr("pack.nodes.gguf.load", lambda paths, *given: calls.append((paths, given)) or text_encoder.load(paths, given[0], options=OPTIONS))
    (clip,) = GGUFTextEncoderLoader.execute("qwen.gguf", "lumina2").args
    assert calls[0][0] == [str(path)] and isinstance(clip, comfy.sd.CLIP)
    stamp = GGUFTextEncoderLoader.fingerprint_inputs("qwen.gguf")
    path.write_bytes(path.read_bytes() + b"\0")
    assert GGUFTextEncoderLoader.fingerprint_inputs("qwen.gguf") != stamp
    with pytest.raises(ValueError, match="not among the files"):
        GGUFTextEncoderLoader.execute("../qwen.gguf", "lumina2")
