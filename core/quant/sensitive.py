"""Layers that stay as they are: modulation, embedders and the last layer. They are few, and errors in them reach every block.

    SENSITIVE[image_model of the host's configuration] = patterns of layer names

The usual exclusions of public quantizers, of the names that the host's classes give these layers.
"""
from fnmatch import fnmatchcase

EMBEDDERS = ("img_in*", "txt_in*", "time_in*", "vector_in*", "guidance_in*", "final_layer*")
SENSITIVE: dict[str, tuple[str, ...]] = {
    "flux": (*EMBEDDERS, "*_mod.lin", "*.modulation.lin"),
    "flux2": (*EMBEDDERS, "*_modulation*"),
    "longcat_image": (*EMBEDDERS, "*_mod.lin", "*.modulation.lin"),
    "chroma": (*EMBEDDERS, "distilled_guidance_layer*"),
    "lumina2": ("x_embedder*", "cap_embedder*", "t_embedder*", "final_layer*", "*adaLN_modulation*", "clip_text_pooled_proj*", "time_text_embed*"),
    "qwen_image": ("img_in*", "txt_in*", "time_text_embed*", "norm_out*", "proj_out*", "*_mod.*"),
    "sd3": ("x_embedder*", "context_embedder*", "t_embedder*", "y_embedder*", "final_layer*", "*adaLN_modulation*"),
}
# of a family that has no line above: all that looks like these, and all that stands outside of numbered blocks
ELSEWHERE = ("*embed*", "*time*", "*mod*", "*adaLN*", "*final*", "*head*", "*norm*", "*proj_in*", "*proj_out*")


def is_sensitive(name: str, family: str) -> bool:
    """Whether a layer keeps its precision. `family`: the host's image_model, "" where it has none."""
    patterns = SENSITIVE.get(family)
    if patterns is None:
        return matches(name, ELSEWHERE) or not any(part.isdigit() for part in name.split("."))
    return matches(name, patterns)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
