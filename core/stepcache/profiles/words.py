"""A profile in words, for the user and for those who want its constants elsewhere."""
import math
from collections.abc import Mapping, Sequence

from .facts import sized
from .plan import Plan
from .profile import Profile

SPEED_UPS = (1.5, 2.0, 2.5, 3.0, 4.0)


def described(name: str, profile: Profile, plans: Mapping[int, Plan], remarks: Sequence[str] = ()) -> str:
    facts = profile.facts
    lines = [f"profile '{name}': {facts.model} ({facts.family}) in {facts.precision}, {facts.sampler}, {facts.steps} steps, cfg {facts.cfg:g}, "
             f"latents of {sized(facts.shape)}, {profile.pictures} full run{'s' * (profile.pictures != 1)}"]
    for speed_up in SPEED_UPS:
        plan = plans.get(round(facts.steps / speed_up))
        if plan is not None:
            expected = profile.expected(plan)       # not a number where no check tells it
            told = f", expected error {percent(expected)} of the latent" if math.isfinite(expected) else ""
            lines.append(f"{speed_up:g}x: {steps(len(plan.computed))}, {', '.join(str(n) for n in plan.computed)}{told}")
    lines += [f"measured with {steps(check.computed)}: error {percent(check.measured)} of the latent, in the median" for check in profile.checks]
    lines += [f"bettered by trials: {steps(len(plan.computed))}, error {percent(plan.measured)}" for plan in profile.refined]
    if profile.teacache is not None:
        told = ", ".join(f"{value:.8g}" for value in profile.teacache.coefficients)
        lines.append(f"TeaCache coefficients, fitted on the {profile.teacache.signal}, off by {profile.teacache.error:.2g} in the mean: [{told}]")
    for condition, curve in zip(("positive", "negative"), profile.magcache, strict=False):
        lines.append(f"MagCache curve, {condition} condition: [{', '.join(f'{ratio:.5f}' for ratio in curve)}]")
    return "\n".join([*lines, *(f"note: {remark}" for remark in remarks)])


def steps(count: int) -> str:
    return f"{count} computed step{'s' * (count != 1)}"


def percent(error: float) -> str:
    """With two digits that count, however small: tolerances below 0.001 are chosen by them too."""
    share = float(f"{100 * error:.1e}")
    return f"{share:.{max(1 - math.floor(math.log10(share)), 0)}f}%" if share else "0%"
