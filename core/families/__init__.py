"""Model families, in the order they are tried. A new one is a file here and a line below."""
from ..registry import Registry
from .aura import AURA
from .base import Family, Side, Stack, Unfamiliar
from .chroma import CHROMA
from .cosmos_predict2 import COSMOS_PREDICT2
from .flux import FLUX
from .hidream_i1 import HIDREAM_I1
from .hunyuan_video import HUNYUAN_VIDEO
from .kandinsky5 import KANDINSKY5
from .krea2 import KREA2
from .ltxav import LTXAV
from .ltxv import LTXV
from .nextdit import NEXTDIT
from .omnigen2 import OMNIGEN2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .unet import UNET
from .wan import WAN

FAMILIES = Registry(
    "model family",
    FLUX,
    CHROMA,
    NEXTDIT,
    QWEN_IMAGE,
    SD3,
    HIDREAM_I1,
    COSMOS_PREDICT2,
    AURA,
    OMNIGEN2,
    KREA2,
    WAN,
    HUNYUAN_VIDEO,
    LTXV,
    LTXAV,
    KANDINSKY5,
    UNET,
)


def family_of(diffusion_model) -> Family | None:
    """The family of a diffusion model of the host, or None."""
    return next((family for family in FAMILIES.values() if family.matches(diffusion_model)), None)


__all__ = ["FAMILIES", "Family", "Side", "Stack", "Unfamiliar", "family_of"]
