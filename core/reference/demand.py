"""How many entries a run will want, told before it begins: the host is asked to free memory for so many.

A reference is encoded once for each of what its entry hangs on: text and guidance of a condition, its LoRA hooks, and the size
that the model sees of it. The host adds conditions of its own: each area of one side gets the other side's prompt.
Sizes of a condition are those of its area, and of every context window where the model sees the picture in windows.
"""
import math
from collections.abc import Iterator, Mapping

import comfy.samplers
import torch
from comfy.context_windows import IndexListContextHandler

from .entry import fingerprint
from .handle import NAME, Reference, is_there

TEXTS, GUIDANCE = "reprise.texts", "reprise.guidance"     # in the model conditions of copies, which the host hands on to those that it adds


def one_sided(guider) -> bool:
    """Whether the host leaves the negative out: at cfg 1, unless something asks for it."""
    plain = getattr(type(guider), "predict_noise", None) is comfy.samplers.CFGGuider.predict_noise
    return plain and math.isclose(guider.cfg, 1.0) and not guider.model_options.get("disable_cfg1_optimization", False)


def evaluated(conds: Mapping[str, list[dict]], alone: bool) -> dict[str, list[dict]]:
    """The sides that a run computes. alone: the positive one only."""
    return {side: entries for side, entries in conds.items() if not alone or side == "positive"}


def wanted(conds: Mapping[str, list[dict]], shape, handler=None, alone: bool = False) -> list[Reference]:
    """A reference as often as it will be encoded, or once if it is there already.

    conds: the host's, before the run; shape: of the sampled latent; handler: of context windows.
    """
    found: dict[tuple, Reference] = {}
    if not any(NAME in cond.get("model_conds", {}) for entries in conds.values() for cond in entries):
        return []
    for cond in as_evaluated(evaluated(conds, alone), shape):
        held = cond["model_conds"]
        hooks = tuple(map(id, getattr(cond.get("hooks"), "hooks", ())))
        for reference in held[NAME].cond.references if NAME in held else ():
            recipe = reference.recipe
            hangs_on = getattr(recipe, "hangs_on", ())
            for text in held[TEXTS] if "pooled" in hangs_on else [None]:
                for size in sizes(cond, shape, handler) if "size" in hangs_on else [None]:
                    key = (id(recipe), text, held[GUIDANCE] if "guidance" in hangs_on else None, size, () if is_there(recipe) else hooks)
                    found[key] = reference if key not in found or reference.acts else found[key]
    return list(found.values())


def as_evaluated(conds: Mapping[str, list[dict]], shape) -> Iterator[dict]:
    """Copies of the conditions as the host will evaluate them, with those that it adds."""
    copies = {side: [marked(cond, shape[0]) for cond in entries] for side, entries in conds.items()}
    for entries in copies.values():
        comfy.samplers.resolve_areas_and_cond_masks_multidim(entries, shape[2:], "cpu")
    for side, entries in copies.items():
        for cond in entries:
            for other in (others for name, others in copies.items() if name != side):
                comfy.samplers.create_cond_with_same_area_if_none(other, cond)
    return (cond for entries in copies.values() for cond in entries)


def marked(cond: dict, batch: int) -> dict:
    pooled = cond.get("pooled_output")
    texts = {fingerprint(row) for row in pooled[:batch]} if torch.is_tensor(pooled) and len(pooled) else {None}
    return {**cond, "model_conds": {**cond.get("model_conds", {}), TEXTS: texts, GUIDANCE: cond.get("guidance")}}


def sizes(cond: dict, shape, handler) -> set[tuple[int, ...]]:
    """H and W that the model sees of a condition."""
    area = cond.get("area")
    seen = list(shape) if area is None else [*shape[:2], *area[:len(area) // 2]]
    if not isinstance(handler, IndexListContextHandler):
        return {tuple(seen[-2:])}
    return {tuple(length if dim == handler.dim else size for dim, size in enumerate(seen))[-2:] for length in lengths(shape[handler.dim], handler)}


def lengths(size: int, handler: IndexListContextHandler) -> set[int]:
    """Of the context windows over so many places; one that begins behind another has a place of that in front, where the host anchors it."""
    windows = handler.context_schedule.func(size, handler, {})
    return {len(window) + more for window in windows for more in range(1 + (handler.causal_window_fix and len(windows) > 1))}
