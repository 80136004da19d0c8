"""Levels, in menu order. A new one is a file here and a line below."""
from ...registry import Registry
from .automatic import Automatic
from .base import Blocks, Call, Level, Seam
from .block_range import BlockRange
from .guided_output import GuidedOutput
from .model_output import ModelOutput

LEVELS = Registry(
    "level",
    Automatic,
    GuidedOutput,
    ModelOutput,
    BlockRange,
)

__all__ = ["LEVELS", "BlockRange", "Blocks", "Call", "GuidedOutput", "Level", "ModelOutput", "Seam"]
