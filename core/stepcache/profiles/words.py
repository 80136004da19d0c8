"""A profile in words, for the user and for those who want its constants elsewhere."""
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
            told = f", expected error {profile.expected(plan):.1%} of the latent" if profile.checks else ""
            lines.append(f"{speed_up:g}x: {len(plan.computed)} computed steps, {', '.join(str(n) for n in plan.computed)}{told}")
    lines += [f"measured with {check.computed} computed steps: error {check.measured:.1%} of the latent, in the median" for check in profile.checks]
    lines += [f"bettered by trials: {len(plan.computed)} computed steps, error {plan.measured:.1%}" for plan in profile.refined]
    if profile.teacache is not None:
        told = ", ".join(f"{value:.8g}" for value in profile.teacache.coefficients)
        lines.append(f"TeaCache coefficients, fitted on the {profile.teacache.signal}, off by {profile.teacache.error:.2g} in the mean: [{told}]")
    for condition, curve in zip(("positive", "negative"), profile.magcache, strict=False):
        lines.append(f"MagCache curve, {condition} condition: [{', '.join(f'{ratio:.5f}' for ratio in curve)}]")
    return "\n".join([*lines, *(f"note: {remark}" for remark in remarks)])
