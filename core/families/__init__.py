"""Model families, in the order they are tried. A new one is a file here and a line below."""
from ..registry import Registry
from .base import Family, Stack
from .flux import FLUX
from .nextdit import NEXTDIT
from .unet import UNET

FAMILIES = Registry(
    "model family",
    FLUX,
    NEXTDIT,
    UNET,
)


def family_of(diffusion_model) -> Family | None:
    """The family of a diffusion model of the host, or None."""
    return next((family for family in FAMILIES.values() if family.matches(diffusion_model)), None)


__all__ = ["FAMILIES", "Family", "Stack", "family_of"]
