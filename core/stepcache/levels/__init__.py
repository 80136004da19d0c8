"""Levels, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .automatic import Automatic
from .base import Blocks, Call, Level, Seam, Unfit
from .block_range import BlockRange
from .block_ranges import BlockRanges
from .front_or_rear import FrontOrRearRange
from .guided_output import GuidedOutput
from .model_output import ModelOutput
from .unet_depth import UnetDepth
from .unet_encoder import UnetEncoder

LEVELS = Registry(
    "level",
    Automatic,
    GuidedOutput,
    ModelOutput,
    BlockRange,
    UnetDepth,
    UnetEncoder,
    FrontOrRearRange,
    BlockRanges,
)

__all__ = ["LEVELS", "BlockRange", "Blocks", "Call", "GuidedOutput", "Level", "ModelOutput", "Seam", "UnetEncoder", "Unfit"]
