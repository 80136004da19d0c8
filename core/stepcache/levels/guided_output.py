"""Guided output: the whole evaluation, after guidance. Saves every block, ControlNet and all conditions.

    d = (x - denoised) / sigma          kept and predicted
    denoised' = x - sigma d'

With `look_back`, a computed step makes up for what the skipped ones before it got wrong (look_back.py), for samplers
whose step is known (solvers.py).
"""
from dataclasses import dataclass

from ...knob import knob
from .base import Seam, derivative, from_derivative


@dataclass(frozen=True)
class GuidedOutput:
    name = "guided output"
    seam = Seam.GUIDED
    gates = False
    serves = None
    look_back: bool = knob(True, "A computed step makes up for what the skipped ones before it got wrong. With euler, ddim and dpmpp_2m.")

    def resolve(self, policy):
        return self

    def evaluate(self, cache, call, compute):
        (row,) = call.rows
        guess = None
        if cache.attempt(lambda: cache.skips(row=row, x=call.x), row.device) and cache.ready(row, call.x.shape):
            guess = cache.attempt(lambda: from_derivative(call.x, cache.handed_out(cache.predict(row)), call.sigma), row.device)
        cache.ran(1, 1.0 if guess is None else 0.0)
        if guess is not None:
            return guess
        denoised = compute()
        told = None if cache.broken else cache.attempt(lambda: learn(cache, call, denoised), row.device)
        return denoised if told is None else told


def learn(cache, call, denoised):
    """What to hand out in place of `denoised`; none where that is right as it is."""
    d = derivative(call.x, denoised, call.sigma)
    known, told = cache.made_up(d)
    cache.learn(call.rows[0], known)
    return None if told is d else from_derivative(call.x, told, call.sigma)
