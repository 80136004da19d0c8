"""What rides on a model: an attachment in its transformer options, and the wrappers that read it there."""
from collections.abc import Iterable, Mapping

COMPILE = "torch.compile"       # the key of the host's wrapper that swaps compiled modules in


def attached(model, key: str, attachment, wrappers: Mapping[str, object]):
    """A clone of `model` with the attachment and, by the host's kinds, the wrappers under `key`; a second call replaces what the first set."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[key] = attachment
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def options_of(args: tuple, kwargs: dict) -> dict:
    """The transformer options of a call of a network, whose place differs from family to family; none gives an empty dict."""
    options = kwargs.get("transformer_options")
    return next((a for a in reversed(args) if isinstance(a, dict) and "sigmas" in a), {}) if options is None else options


def any_compiled(modules: Iterable) -> bool:
    """Whether one of these is torch.compile's, or was compiled in place by `module.compile()`."""
    return any(type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None for module in modules)
