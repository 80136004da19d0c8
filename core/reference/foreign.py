"""Models that run in an engine of their own: their attention is out of reach, whatever their class says it is."""

ENGINES = {"nunchaku": "nunchaku", "tensorrt": "TensorRT", "trtunet": "TensorRT"}     # part of the name of a class or its module -> engine


def foreign(what: str, network) -> str:
    """A sentence for `what` came to such a model; nothing where the host's own classes compute.

    nunchaku's FLUX is a wrapper around `model`, its others are subclasses of the host's; a TensorRT engine is no module at all.
    """
    kinds = [*type(network).__mro__, *type(getattr(network, "model", None)).__mro__]
    names = [f"{kind.__module__}.{kind.__qualname__}".lower() for kind in kinds]
    for part, engine in ENGINES.items():
        if any(part in name for name in names):
            return (f"{what} came to a model that {engine} runs ({type(network).__name__}), and references act in ComfyUI's own attention; "
                    "load the model with one of ComfyUI's own loaders")
    return ""
