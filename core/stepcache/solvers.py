"""How a sampler goes on from a denoised latent, for those whose step is linear and known.

    x_{n+1} = a x_n + b D_n + e D_{n-1}

The keys are the host's sampler functions, less their "sample_". A sampler that is not here is served without looking back.
"""
import math
from collections.abc import Callable, Sequence


def euler(sigmas: Sequence[float], n: int) -> tuple[float, float, float]:
    """a, b, e of Euler's step, Algorithm 2 of Karras et al. (arXiv 2206.00364) without churn."""
    kept = sigmas[n + 1] / sigmas[n]
    return kept, 1 - kept, 0.0


def dpmpp_2m(sigmas: Sequence[float], n: int) -> tuple[float, float, float]:
    """a, b, e of DPM-Solver++(2M) (Lu et al., arXiv 2211.01095), whose first and last steps are Euler's."""
    kept = sigmas[n + 1] / sigmas[n]
    if n == 0 or sigmas[n + 1] <= 0:
        return euler(sigmas, n)
    now, before = -math.log(kept), math.log(sigmas[n - 1] / sigmas[n])     # steps in log sigma
    share = now / (2 * before)
    return kept, (1 - kept) * (1 + share), -(1 - kept) * share


SOLVERS: dict[str, Callable[[Sequence[float], int], tuple[float, float, float]]] = {"euler": euler, "dpmpp_2m": dpmpp_2m}
