"""Model output: one call of the model, every condition by itself. Guidance and ControlNet still run.

    d = (x - denoised) / sigma          kept and predicted per condition
"""
from dataclasses import dataclass

import torch

from .base import Seam, derivative, from_derivative


@dataclass(frozen=True)
class ModelOutput:
    name = "model output"
    seam = Seam.MODEL
    gates = False
    serves = None

    def resolve(self, policy):
        return self

    def evaluate(self, cache, call, compute):
        n, device = len(call.rows), call.rows[0].device
        parts = call.x.chunk(n)
        guess = None
        if cache.attempt(lambda: cache.skips(row=call.rows[0], x=parts[0]), device) and all(
                cache.ready(row, part.shape) for row, part in zip(call.rows, parts, strict=True)):
            guess = cache.attempt(lambda: from_derivative(call.x, torch.cat([cache.predict(row) for row in call.rows]), call.sigma), device)
        cache.ran(n, 1.0 if guess is None else 0.0)
        if guess is not None:
            return guess
        denoised = compute()
        if not cache.broken:
            cache.attempt(lambda: learn(cache, call, denoised), device)
        return denoised


def learn(cache, call, denoised):
    n = len(call.rows)
    for row, part in zip(call.rows, derivative(call.x, denoised, call.sigma).chunk(n), strict=True):
        cache.learn(row, part if n == 1 else part.clone())
