"""What stands on the model in place of a modulation whose weights stay off the GPU, and how they get there for a moment.

The host sees no parameter of a stand-in, so it loads none and moves none; but its state dict and its paths are those of the
modulation, so LoRAs find their layers and a saved model is complete.
"""
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

# What the host's dynamic loading leaves on a layer that a clone without the cache loaded: pages of the GPU, and patches of that clone.
PAGES, PATCHES = ("_v", "_v_signature", "_prefetch"), ("weight_lowvram_function", "bias_lowvram_function")


class Seat:
    """What all stand-ins of one model share: its patcher, and the table of the run that is going on, if any."""

    def __init__(self, model, names: list[str], bytes: int):
        self.model, self.names, self.bytes = weakref.ref(model), names, bytes
        self.table = None
        self.loaded = lambda: None

    def patcher(self):
        """The patcher whose patches are in force: that of the sampling, or the one that was loaded last."""
        return getattr(self.model(), "current_patcher", None) or self.loaded()


class StandIn(nn.Module):
    """Gives what the modulation `held`, at `name` in the model, would; from the table of a run where it is in it."""

    computes_the_same = True    # read by whoever asks whether a replaced module changes what the model computes

    def __init__(self, name: str, held: nn.Module, seat: Seat):
        super().__init__()
        vars(self).update(name=name, held=held, seat=seat)      # past torch, which would register `held` as a part

    @torch.compiler.disable
    def forward(self, vector: Tensor):
        table = self.seat.table
        if table is None or vector.requires_grad:
            with self.lent(vector):
                return self.held(vector)
        return table.ask(self, vector)

    def lent(self, vector: Tensor):
        return lent(self.held, self.name, self.seat.patcher(), vector)

    def state_dict(self, *args, **kwargs):
        return self.held.state_dict(*args, **kwargs)

    def __getitem__(self, index):
        return self.held[index]

    def __getattr__(self, name: str):
        parts = self.held._modules
        return parts[name] if name in parts else super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in self.held._modules:
            setattr(self.held, name, value)
        else:
            super().__setattr__(name, value)


def original(patcher, name: str) -> nn.Module:
    """The module at `name` that the model came with."""
    there = patcher.object_patches_backup.get(name)
    there = comfy.utils.get_attr(patcher.model, name) if there is None else there
    return there.held if isinstance(there, StandIn) else there


def layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The parts that hold tensors of their own, by their path in the model."""
    for path, layer in module.named_modules():
        if any(tensor is not None for tensor in (*layer._parameters.values(), *layer._buffers.values())):
            yield (f"{name}.{path}" if path else name), layer


def width(layer: nn.Module) -> int:
    """Of what a linear layer gives."""
    return getattr(layer, "out_features", None) or layer.weight.shape[0]


@contextmanager
def lent(module: nn.Module, name: str, patcher, vector: Tensor):
    """The modulation's weights are on the vector's device, patched as the host would patch them, for as long as this lasts."""
    wrappers, kept = {} if patcher is None else patcher.weight_wrapper_patches, []
    try:
        for path, layer in layers(module, name):
            state = vars(layer)
            kept.append((layer, dict(state)))
            parameters = {kind: None if parameter is None else weight_on(patcher, layer, path, kind, vector)
                          for kind, parameter in layer._parameters.items()}
            buffers = {kind: None if buffer is None else comfy.model_management.cast_to_device(buffer, vector.device, None)
                       for kind, buffer in layer._buffers.items()}
            for mark in PAGES:
                state.pop(mark, None)
            for mark in PATCHES:
                if hasattr(layer, mark):
                    setattr(layer, mark, None)      # a layer of the loader keeps it elsewhere, and knows where
            state.update(_parameters=parameters, _buffers=buffers)
            if hasattr(layer, "comfy_cast_weights"):
                state.update(
                    comfy_cast_weights=True, comfy_force_cast_weights=patcher is not None and patcher.force_cast_weights,
                    weight_function=list(wrappers.get(f"{path}.weight", ())), bias_function=list(wrappers.get(f"{path}.bias", ())))
        yield
    finally:
        for layer, state in kept:
            vars(layer).clear()
            vars(layer).update(state)


def weight_on(patcher, layer: nn.Module, path: str, kind: str, vector: Tensor) -> nn.Parameter:
    """A parameter as the host would have it on the vector's device: as a loaded model's, or on the fly where the host loads so."""
    parameter, key, device = layer._parameters[kind], f"{path}.{kind}", vector.device
    patched = patcher is not None and key in patcher.patches
    if patched and (not patcher.is_dynamic() or isinstance(parameter, QuantizedTensor)):
        return nn.Parameter(patcher.patch_weight_to_device(key, device_to=device, return_weight=True), requires_grad=False)
    weight = comfy.model_management.cast_to_device(parameter, device, None)
    own = getattr(layer, f"{kind}_comfy_model_dtype", None)
    if own is not None and not isinstance(weight, QuantizedTensor):
        weight = weight.to(own)     # a file's own type, where the host leaves it until it is needed
    if patched:
        weight = LowVramPatch(key, patcher.patches)(weight.to(vector.dtype, copy=True))
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
