"""Which model a state dict is, as the host would find out, checked against what the host would then allocate.

A hostile header may make the host's detection ask for a network of any size. So it is built on the meta device first, where
nothing is allocated, and every weight must be there in the shape that the network has.
"""
import comfy.model_detection
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from .files import BadFile, whole_numbers

# What the host's detection raises on names and shapes that make no sense together; it was not written for hostile files.
CONFUSED = (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError, OverflowError)
MOST_TOLD = 3


def without_prefix(sd: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The diffusion model's part of a whole checkpoint, or all of it."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(sd)
    part = {key.removeprefix(prefix): tensor for key, tensor in sd.items() if key.startswith(prefix)}
    return (part, prefix) if part else (sd, "")


def detect(sd: dict[str, Tensor], metadata: dict, name: str) -> tuple[object, frozenset[str]]:
    """(the host's configuration of the model in `sd`, the names of its linear layers).

    Tensors may be on the meta device: names and shapes are all that counts. BadFile where there is no such model, or where the
    network that the configuration makes is not the one whose weights are there.
    """
    try:
        config = comfy.model_detection.model_config_from_unet(sd, "", metadata=metadata)
    except CONFUSED as error:
        raise BadFile(f"'{name}' looks like a diffusion model and is none that ComfyUI can build ({type(error).__name__}: {error})") from error
    if config is None:
        told = ", ".join(sorted(sd)[:MOST_TOLD])
        raise BadFile(f"'{name}' is no diffusion model that ComfyUI knows; its first tensors are {told or 'none'}; choose a file of models/diffusion_models")
    network = network_of(config, sd, name)
    return config, frozenset(layer for layer, module in network.named_modules() if isinstance(module, nn.Linear))


def network_of(config, sd: dict[str, Tensor], name: str) -> nn.Module:
    """The network on the meta device, after every tensor of it was found in `sd`."""
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = comfy.ops.disable_weight_init
    try:
        network = config.get_model(sd, "", device=torch.device("meta")).diffusion_model
    except CONFUSED as error:
        raise BadFile(f"'{name}': the network that its tensors describe cannot be built ({type(error).__name__}: {error})") from error
    finally:
        config.custom_operations = None
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in sd]
    if missing:
        raise BadFile(f"'{name}' lacks {len(missing)} of {len(wanted)} tensors of its model, the first is '{missing[0]}'; it is not whole")
    for key, tensor in wanted.items():
        if tensor.is_floating_point() and not sd[key].is_floating_point():
            raise whole_numbers(name, key, sd[key])
        if tuple(sd[key].shape) != tuple(tensor.shape):
            found, asked = tuple(sd[key].shape), tuple(tensor.shape)
            raise BadFile(f"'{name}': '{key}' is {found}, and its model has {asked} there; the file is damaged or of another model")
    return network
