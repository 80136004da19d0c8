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
        if cache.skips(row=row, x=call.x) and cache.ready(row, call.x.shape):
            cache.ran(1, 0.0)
            return from_derivative(call.x, cache.handed_out(cache.predict(row)), call.sigma)
        denoised = compute()
        d = derivative(call.x, denoised, call.sigma)
        known, told = cache.made_up(d)
        cache.learn(row, known)
        cache.ran(1, 1.0)
        return denoised if told is d else from_derivative(call.x, told, call.sigma)
