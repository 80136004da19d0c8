"""TeaCache's polynomial, fitted to what was recorded.

    min_p  sum over steps and pictures of (p(x) - y)^2        p of degree 4, by least squares in fp64

x is the relative change of the signal from one step to the next, y that of the output. TeaCache, arXiv 2411.19108; it
fits to many prompts, as here, and takes the modulated input of the first block for its signal.
"""
import torch

from .profile import Polynomial
from .recording import OUTPUT, Recording

DEGREE = 4


def fitted(recordings: list[Recording], signals: tuple[str, ...]) -> Polynomial | None:
    """Of the first of these signals that is known often enough; None where none is."""
    for signal in signals:
        pairs = [(x, y) for recording in recordings for x, y in zip(recording.each[signal], recording.each[OUTPUT], strict=True)
                 if x is not None and y is not None]
        if len(pairs) > DEGREE:
            coefficients, error = polynomial(*zip(*pairs, strict=True))
            return Polynomial(signal, coefficients, error)
    return None


def polynomial(x: tuple[float, ...], y: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """Coefficients, highest power first, and the root mean square of what is left.

    x is scaled to 1 for the fit: the fourth power of a small change would be lost beside the constant.
    """
    at, value = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    scale = at.abs().max().clamp_min(1e-12)
    powers = torch.arange(DEGREE, -1, -1, dtype=torch.float64)
    design = (at / scale).unsqueeze(1) ** powers
    solution = torch.linalg.lstsq(design, value.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    left = (design @ solution - value).square().mean().sqrt().item()
    return tuple((solution / scale ** powers).tolist()), left
