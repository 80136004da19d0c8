"""The host's operations, with layers whose weights may come packed.

A LoRA on a packed layer, by how the host brings it:
    baked (the layer is on the GPU as a whole)       the layer becomes the host's int8 with rotation
    at each call (it is streamed, or memory is       a plain LoRA is a branch beside the product, x down up; any other patch is
    dynamic)                                         put on the decoded weight
    bypass (the host's bypass LoRA node)             a branch beside the product, by the host
"""
from __future__ import annotations

from functools import cache

import comfy.model_management
import comfy.ops
import comfy.weight_adapter
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class
from torch import Tensor
from torch.nn import functional as F

from . import blocks
from .later import later
from .packed import of_blocks, own_int8
from .transcode import int8_mark

INT8, LAYOUT = "int8_tensorwise", "TensorWiseINT8Layout"
WRONG = "'{key}' has the shape {came} in the file, and the model's is {wanted}"
HOST = {algorithm["comfy_tensor_layout"] for algorithm in QUANT_ALGOS.values()}


def is_packed(weight) -> bool:
    """Whether a weight is in a layout that the host's operations do not know: GGUF's blocks, SVDQuant."""
    return isinstance(weight, QuantizedTensor) and weight._layout_cls not in HOST


def int8(weight: Tensor, seed: int | None = None) -> QuantizedTensor:
    """A float weight as a layer of the host's int8 with rotation."""
    group = blocks.rotation_group(weight.shape[1])
    return QuantizedTensor.from_float(weight, LAYOUT, per_channel=True, convrot=bool(group), convrot_groupsize=group or 256, stochastic_rounding=seed or 0)


class Holder:
    """What Linear and Embedding share: a weight that may be packed at one time and the host's int8 at another."""

    @property
    def layout_type(self) -> str | None:
        """Of the weight that is there now: a baked LoRA changes it, and taking the LoRA off changes it back."""
        weight = getattr(self, "weight", None)
        return weight._layout_cls if isinstance(weight, QuantizedTensor) else self.__dict__.get("told_layout")

    @layout_type.setter
    def layout_type(self, name: str | None) -> None:
        self.__dict__["told_layout"] = name     # by the host, before it makes the weight

    @property
    def weight_lowvram_function(self):
        """The host's patch under dynamic memory. For packed weights it is kept from the host, which would write the result back as blocks."""
        return None if is_packed(getattr(self, "weight", None)) else self.__dict__.get("patch")

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch) -> None:
        self.__dict__["patch"] = patch

    def patches(self) -> list:
        """What is to be put on the packed weight at each call."""
        patch = self.__dict__.get("patch")
        return [*([patch] if patch is not None else []), *self.weight_function]

    def take_packed(self, state_dict: dict, prefix: str, shape: tuple[int, int], errors: list) -> bool:
        """Takes a packed weight out of the state dict. The rest is for the host."""
        weight = state_dict.get(f"{prefix}weight")
        if not is_packed(weight):
            return False
        del state_dict[f"{prefix}weight"]
        if tuple(weight.shape) != shape:
            errors.append(WRONG.format(key=f"{prefix}weight", came=list(weight.shape), wanted=list(shape)))
            return True
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_format = INT8        # as which it is saved
        self.stored_as = getattr(weight._params, "type", None) or weight._layout_cls
        return True

    def saved(self, sd: dict, prefix: str) -> dict:
        """The host's state dict of the layer, with a packed weight as the host's int8, and in it the patches that are put on at each call."""
        weight = getattr(self, "weight", None)
        if not is_packed(weight):
            return sd
        patches, layout, group = self.patches(), get_layout_class(weight._layout_cls), blocks.rotation_group(weight.shape[1])

        def made() -> tuple[Tensor, Tensor]:
            if not patches and hasattr(layout, "int8"):
                return layout.int8(weight._qdata, weight._params)
            changed = weight.to(comfy.model_management.get_torch_device()).to(torch.float32).dequantize()
            for patch in patches:
                changed = patch(changed)
            return blocks.quantized(changed, group)

        more = sum(getattr(weight._params, name).nbytes for name in weight._params._tensor_fields())
        parts = later(tuple(weight.shape), weight._qdata.nbytes, more, made)
        sd.update({f"{prefix}weight{ending}": tensor for ending, tensor in parts.items()})
        sd[f"{prefix}comfy_quant"] = int8_mark(group)
        return sd

    def convert_weight(self, weight, inplace=False, **given):
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


@cache
def packed_ops(compute_dtype: torch.dtype, full_precision: bool = False, own: bool = False):
    """The class to hand the host as custom operations. Weights that are not packed are as in its own, in the type of the file.

    full_precision: no products of quantized inputs, as the host has it for text encoders.
    own: products of the host's int8 layers by Reprise's kernel, for devices where comfy_kitchen's is a slow one.
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype, full_precision_mm=full_precision)

    class PackedOps(base):
        class Linear(Holder, base.Linear):
            def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
                key, weight = f"{prefix}weight", state_dict.get(f"{prefix}weight")
                if not self.take_packed(state_dict, prefix, self._orig_shape, errors):
                    if weight is None or f"{prefix}comfy_quant" in state_dict or not weight.dtype.is_floating_point:
                        return super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
                    if tuple(weight.shape) != self._orig_shape:
                        errors.append(WRONG.format(key=key, came=list(weight.shape), wanted=list(self._orig_shape)))
                        return None
                    # The host would cast it to the type that it computes in; kept as it is, it is cast at each use, and loses nothing.
                    self.weight = torch.nn.Parameter(state_dict.pop(key).to(device=self.factory_kwargs["device"]), requires_grad=False)
                torch.nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors)
                if key in missing:
                    missing.remove(key)

            def state_dict(self, *args, destination=None, prefix="", **given):
                return self.saved(super().state_dict(*args, destination=destination, prefix=prefix, **given), prefix)

            def forward(self, input, *args, **given):
                patch = self.__dict__.get("patch")
                if patch is None or not is_packed(self.weight):
                    return super().forward(input, *args, **given)
                branches = plain_loras(patch.patches[patch.key])
                if branches is None:
                    return self.forward_decoded(input, patch)
                return beside(super().forward(input, *args, **given), input, branches)

            def _forward(self, input, weight, bias):
                out = own_int8(input, weight, bias) if own and type(input) is Tensor else None      # a kernel of a block may be waiting in a Deferred
                return super()._forward(input, weight, bias) if out is None else out

            def forward_decoded(self, input: Tensor, patch) -> Tensor:
                weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
                try:
                    whole = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                    return F.linear(input, patch(whole), bias)
                finally:    # the pages of the weight are held for us until then
                    comfy.ops.uncast_bias_weight(self, weight, bias, stream)

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **given):
                if not is_packed(self.weight):
                    return super().set_weight(weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight, **given)
                if inplace_update:
                    raise ValueError("a LoRA on a schedule (hooks) came to a layer that is kept packed, and its weights cannot be changed in their place; "
                                     "load the LoRA for the whole run, or load the model with compute int8 or bf16 for all layers")
                made = int8(weight, seed).to(self.weight.dtype)
                if return_weight:
                    return made
                self.weight = torch.nn.Parameter(made, requires_grad=False)
                return None

        class Embedding(Holder, base.Embedding):
            def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
                key = f"{prefix}weight"
                if not self.take_packed(state_dict, prefix, (self.num_embeddings, self.embedding_dim), errors):
                    return super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
                torch.nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors)
                if key in missing:
                    missing.remove(key)

            def state_dict(self, *args, destination=None, prefix="", **given):
                return self.saved(super().state_dict(*args, destination=destination, prefix=prefix, **given), prefix)

            def forward_comfy_cast_weights(self, input, out_dtype=None):
                weight = self.weight
                if not is_packed(weight):
                    return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
                if self.patches():
                    return comfy.ops.manual_cast.Embedding.forward_comfy_cast_weights(self, input, out_dtype=out_dtype)
                if not of_blocks(weight):
                    return F.embedding(input, weight.dequantize().to(input.device)).to(out_dtype or weight.dtype)
                # The rows that are asked for, read where the table lies: it is large, and a prompt has a few hundred tokens.
                rows = weight._qdata[input.reshape(-1).to(weight._qdata.device)].to(input.device)
                return blocks.values(rows, weight._params.type, out_dtype or weight.dtype).reshape(*input.shape, -1)

    return PackedOps


# a LoRA beside the product ---------------------------------------------------------------------------------------------
def plain_loras(patches: list) -> list[tuple] | None:
    """(strength, up, down, alpha, slice) of each patch, or None where one of them is more than W + up down."""
    found = []
    for strength, adapter, of_weight, offset, function in patches:
        if not isinstance(adapter, comfy.weight_adapter.LoRAAdapter) or of_weight != 1.0 or function is not None:
            return None
        up, down, alpha, *more = adapter.weights
        if any(part is not None for part in more):      # a tensor in the middle, DoRA, or another shape
            return None
        found.append((strength, up, down, alpha, offset))
    return found


def beside(out: Tensor, x: Tensor, branches: list[tuple]) -> Tensor:
    """out: [..., N], what the layer gave; x: [..., K], what it got. Returns out + strength alpha / rank (x down) up, summed over the branches."""
    for strength, up, down, alpha, offset in branches:
        up, down = (comfy.model_management.cast_to_device(part, x.device, x.dtype).flatten(1) for part in (up, down))
        taken = x.narrow(-1, *offset[1:]) if offset is not None and offset[0] == 1 else x
        add = F.linear(F.linear(taken, down), up) * (strength * (1.0 if alpha is None else alpha / down.shape[0]))
        if offset is not None and offset[0] == 0:
            out = out.slice_scatter(out.narrow(-1, *offset[1:]) + add, -1, offset[1], offset[1] + offset[2])
        else:
            out = out + add
    return out
