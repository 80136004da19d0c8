"""Who may compute attention, in the order of the menu. A new one is a class here and a line in BACKENDS.

A backend says why it is not there, why it does not serve a device, and why it does not serve a call; what it does not
serve goes to the function that the host would have called.
"""
import inspect
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from comfy.ldm.modules.attention import get_attention_function
from torch import Tensor

from ..registry import Registry
from .machine import KITCHEN_INT8, SAGE_1, SAGE_2

HALF = (torch.float16, torch.bfloat16)
UNDERSTOOD = {"scale", "enable_gqa", "low_precision_attention", "transformer_options", "_inside_attn_wrapper"}


@dataclass
class Call:
    """The arguments of one call of the host's attention. q, k, v: [B, N, H D], or [B, H, N, D] with `skip_reshape`."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None
    attn_precision: torch.dtype | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False
    others: dict = field(default_factory=dict)

    @classmethod
    def of(cls, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **others) -> "Call":
        return cls(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, others)

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.q.shape[-1] if self.skip_reshape else self.q.shape[-1] // self.heads

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, H, N, D], the last dimension contiguous; k and v have fewer heads where the model shares them."""
        if self.skip_reshape:
            parts = (self.q, self.k, self.v)
        else:
            parts = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return tuple(part if part.stride(-1) == 1 else part.contiguous() for part in parts)

    def mask_4d(self) -> Tensor | None:
        """The mask with dimensions for batch and heads, as the host understands masks of two and three."""
        mask = self.mask
        if mask is not None and mask.ndim == 2:
            mask = mask[None]
        return mask[:, None] if mask is not None and mask.ndim == 3 else mask

    def joined(self, out: Tensor) -> Tensor:
        """[B, H, N, D] as the caller wants it."""
        return out if self.skip_output_reshape else out.transpose(1, 2).flatten(2)


class Backend:
    """low: computes in 8 bits, so that what it gives is approximate. get: what to do where it is missing."""

    name: str
    low = True
    get: str

    def missing(self, importing: bool = True) -> str:
        """Why it is not there, in a phrase. Where not `importing`, a package that nobody has imported yet is taken to be right."""
        raise NotImplementedError

    def unable(self, device: torch.device) -> str:
        """Why it does not serve a device, in a phrase."""
        return "" if device.type == "cuda" else f"it is for GPUs, not for {device.type}"

    def unfit(self, call: Call) -> str:
        """Why it does not serve a call, in a phrase."""
        if strange := sorted(set(call.others) - UNDERSTOOD):
            return f"an argument that is not known: {', '.join(strange)}"
        if self.low and call.others.get("low_precision_attention", True) is False:
            return "the model asks for full precision"
        if self.low and call.attn_precision == torch.float32:
            return "the model asks for fp32"
        if not all(torch.is_tensor(part) and part.ndim == (4 if call.skip_reshape else 3) for part in (call.q, call.k, call.v)):
            return "tensors of an unknown shape"
        if not call.q.dtype == call.k.dtype == call.v.dtype or not call.q.device == call.k.device == call.v.device:
            return "q, k and v of different types or devices"
        if call.mask is not None and call.mask.ndim not in (2, 3, 4):
            return "a mask of an unknown shape"
        query, key = (call.q.shape[1], call.k.shape[1]) if call.skip_reshape else (call.heads, call.k.shape[-1] // max(call.width, 1))
        if query != key and not (call.others.get("enable_gqa") and key and query % key == 0):
            return "heads that do not fit"
        return self.unable(call.q.device)

    def attend(self, call: Call) -> Tensor:
        q, k, v = call.split()
        return call.joined(self.compute(q, k, v, call.mask_4d(), call.others.get("scale")))

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """q: [B, H, N, D]; k, v: [B, H or a part of it, M, D]; mask: broadcasts to [B, H, N, M]. Gives [B, H, N, D]."""
        raise NotImplementedError


class Sage2(Backend):
    name, get = SAGE_2, "build or install sageattention 2 for your torch and CUDA (github.com/thu-ml/SageAttention)"
    mark = "sageattn_qk_int8_pv_fp8_cuda"       # that one of its kernels has, and one of the other major version has not
    most = 128                                  # channels of a head

    def missing(self, importing: bool = True) -> str:
        module = imported("sageattention", importing)
        if isinstance(module, ModuleType) and not self.right(module):
            return f"another version of sageattention than {self.name[-1]} is installed"
        return module if isinstance(module, str) else ""

    def right(self, module: ModuleType) -> bool:
        return hasattr(module, "sageattn") and hasattr(module, self.mark)

    def unfit(self, call: Call) -> str:
        if why := super().unfit(call):
            return why
        if call.q.dtype not in HALF:
            return f"{told(call.q.dtype)}, and it takes 16 bits"
        if not self.takes(call.width):
            return f"heads of {call.width} channels"
        if call.mask is not None and not takes_mask(function("sageattention", "sageattn")):
            return "a mask"
        return ""

    def takes(self, width: int) -> bool:
        return width <= self.most

    def compute(self, q, k, v, mask, scale):
        masked = {} if mask is None else {"attn_mask": mask}
        return function("sageattention", "sageattn")(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale, **masked)


class Sage1(Sage2):
    name, get = SAGE_1, "install sageattention 1 and Triton (pip install sageattention)"

    def right(self, module: ModuleType) -> bool:
        return hasattr(module, "sageattn") and not hasattr(module, self.mark)

    def takes(self, width: int) -> bool:
        return width in (64, 96, 128)


class KitchenInt8(Backend):
    name, get = KITCHEN_INT8, "update comfy-kitchen to a version with int8_attention, or choose another backend"
    most = 256

    def missing(self, importing: bool = True) -> str:
        module = imported("comfy_kitchen", importing)
        if isinstance(module, str):
            return module
        return "" if hasattr(module, "int8_attention") else "this comfy_kitchen has no int8 attention yet"

    def unable(self, device: torch.device) -> str:
        if why := super().unable(device):
            return why
        available = getattr(imported("comfy_kitchen"), "int8_attention_is_available", None)
        return "" if available is None or available(device) else "its kernels do not serve this GPU"

    def unfit(self, call: Call) -> str:
        if why := super().unfit(call):
            return why
        return f"heads of {call.width} channels" if call.width > self.most else ""

    def compute(self, q, k, v, mask, scale):
        return function("comfy_kitchen", "int8_attention")(q, k, v, scale=scale, attn_mask=mask)


class OfTheHost(Backend):
    """One that the host calls by itself, arguments and all."""

    low = False
    key: str        # the host's name for it

    def missing(self, importing: bool = True) -> str:
        return "" if get_attention_function(self.key, None) is not None else f"{self.name} is not installed, or ComfyUI does not use it here"

    def attend(self, call: Call) -> Tensor:
        return get_attention_function(self.key)(
            call.q, call.k, call.v, call.heads, mask=call.mask, attn_precision=call.attn_precision, skip_reshape=call.skip_reshape,
            skip_output_reshape=call.skip_output_reshape, **{"_inside_attn_wrapper": True, **call.others})


class Xformers(OfTheHost):
    name, key, get = "xformers", "xformers", "install the xformers that was built for your torch"

    def unfit(self, call: Call) -> str:
        if why := super().unfit(call):
            return why
        return "a mask of yes and no" if call.mask is not None and call.mask.dtype == torch.bool else ""


class Sdpa(OfTheHost):
    name, key, get = "SDPA", "pytorch", ""

    def unable(self, device: torch.device) -> str:
        return ""

    def unfit(self, call: Call) -> str:
        return ""       # the host hands it whatever comes


BACKENDS = Registry("attention backend", Sage2(), KitchenInt8(), Sage1(), Xformers(), Sdpa())


def imported(name: str, importing: bool = True) -> ModuleType | str:
    """A package, or why there is none. Where not `importing` it is only looked for: the answer for one that is there is then empty."""
    try:
        if not importing and waiting(name):
            return ""
        return import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else "installed, and lacks a package of its own"
    except (ImportError, OSError, RuntimeError, AttributeError):
        return "installed, and does not load with this torch"


def waiting(name: str) -> bool:
    """Whether a package is there that nobody has imported yet."""
    return name not in sys.modules and find_spec(name) is not None


def function(package: str, name: str):
    return getattr(import_module(package), name)


@cache
def takes_mask(sage) -> bool:
    """Whether it takes a mask by name; some versions swallow one without a word."""
    return "attn_mask" in inspect.signature(sage).parameters


def told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
