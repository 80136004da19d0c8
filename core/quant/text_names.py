"""How llama.cpp names the tensors of text encoders, and how the host does.

From the `gguf` package's constants (MODEL_TENSORS) and the host's comfy/text_encoders/t5.py and llama.py.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field

from .files import BadFile


@dataclass(frozen=True)
class Names:
    """A kind of text encoder. Names are without their ending, .weight or .bias."""

    architectures: tuple[str, ...]      # general.architecture
    blocks: tuple[str, str]             # what the names of blocks begin with: in the file, at the host
    block: dict[str, str]               # within a block
    other: dict[str, str]
    optional: tuple[str, ...] = ()      # of `block`; all others must be in every block
    unused: tuple[str, ...] = ()        # names, or beginnings with a dot, of what an encoder does not need
    wrong: dict[str, str] = field(default_factory=dict)     # a tensor that only another model has, and what to do then


T5 = Names(
    architectures=("t5encoder", "t5"),
    blocks=("enc.blk.", "encoder.block."),
    block={
        "attn_norm": "layer.0.layer_norm", "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
        "attn_o": "layer.0.SelfAttention.o", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias", "ffn_norm": "layer.1.layer_norm",
        "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo"},
    optional=("attn_rel_b",),       # the first block's serves all; umT5 has one in each
    other={"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"},
    unused=("dec.", "output"),
    wrong={"enc.blk.1.attn_rel_b": "is umT5, whose tokenizer a GGUF file does not have in the form that ComfyUI reads; "
                                   "load the .safetensors of it with Load CLIP"})

QWEN = Names(
    architectures=("qwen3", "qwen2vl", "qwen2"),
    blocks=("blk.", "model.layers."),
    block={
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
    optional=("attn_q_norm", "attn_k_norm"),        # of Qwen3; Qwen2 has biases instead
    other={"token_embd": "model.embed_tokens", "output_norm": "model.norm"},
    unused=("output", "rope_freqs"))

TEXT_ENCODERS = (T5, QWEN)
KNOWN = tuple(name for names in TEXT_ENCODERS for name in names.architectures)


def names_of(architecture: str) -> Names:
    return next(names for names in TEXT_ENCODERS if architecture in names.architectures)


def renamed(tensors: dict, names: Names, file: str) -> dict:
    """The tensors under the host's names. BadFile where one is missing, or is of no such model."""
    begin, host = names.blocks
    found, parts = {}, {}
    for key, tensor in tensors.items():
        stem, _, ending = key.rpartition(".")
        if stem in names.wrong:
            raise BadFile(f"'{file}' {names.wrong[stem]}")
        block = re.fullmatch(re.escape(begin) + r"(\d{1,4})\.(\w+)", stem, re.ASCII)
        if ending not in ("weight", "bias"):
            new = None
        elif block and block[2] in names.block:
            new = f"{host}{int(block[1])}.{names.block[block[2]]}"
            parts.setdefault(int(block[1]), set()).add(block[2])
        else:
            new = names.other.get(stem)
        if new is not None:
            found[f"{new}.{ending}"] = tensor
        elif not any(stem == one or one.endswith(".") and key.startswith(one) for one in names.unused):
            raise BadFile(f"'{file}': tensor '{key[:100]}' is of no {' or '.join(names.architectures)} model that is known here; choose another file")
    needed = [name for name in names.block if name not in names.optional]
    missing = [f"{begin}{index}.{name}" for index in range(max(parts, default=0) + 1) for name in needed if name not in parts.get(index, ())]
    missing += [name for name, new in names.other.items() if f"{new}.weight" not in found]
    if missing:
        raise BadFile(f"'{file}' lacks {len(missing)} tensors of a text encoder, the first is '{missing[0]}'; download it again")
    return found
