"""The conditions of a run as the host has them, {"positive": [...], ...}: which of them act at a sigma, and how strongly."""
import copy

import torch


def acting(conds: dict, sigma: float, schedule: torch.Tensor | None = None) -> tuple:
    """Which conditions and ControlNets act at this sigma, and how strongly each hook of a condition does.

    The output jumps where that changes, so nothing is predicted across it.
    """
    flags: list = [move(copy.copy(hook.hook_keyframe), sigma, schedule).strength for hook in hooks_of(conds)]
    for cond in conditions(conds):
        flags.append(within(sigma, cond.get("timestep_start"), cond.get("timestep_end")))
        control = cond.get("control")
        while control is not None:
            flags.append(within(sigma, *(getattr(control, "timestep_range", None) or (None, None))))
            control = getattr(control, "previous_controlnet", None)
    return tuple(flags)


def conditions(conds: dict) -> list[dict]:
    return [cond for entries in conds.values() for cond in entries]


def hooks_of(conds: dict) -> list:
    return [hook for cond in conditions(conds) for hook in getattr(cond.get("hooks"), "hooks", ())]


def move(keyframes, sigma: float, schedule: torch.Tensor | None):
    """A hook's keyframes, moved on to an evaluation at sigma as the host does it."""
    now = torch.tensor(sigma)       # the host compares tensors, so in single precision
    keyframes.prepare_current_keyframe(now, {"sample_sigmas": now if schedule is None else schedule})
    return keyframes


def within(sigma: float, start: float | None, end: float | None) -> bool:
    if start is None and end is None:
        return True
    now = torch.tensor(sigma)
    return (start is None or bool(now <= float(start))) and (end is None or bool(now >= float(end)))


def window_of(options: dict) -> tuple | None:
    """The context window of a model call, from its transformer options."""
    window = options.get("context_window")
    return None if window is None else tuple(window.index_list)
