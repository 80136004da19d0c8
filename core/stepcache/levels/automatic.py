"""Automatic: guided output, which saves most; block range for a policy that must see the first blocks run."""
from dataclasses import dataclass

from .block_range import BlockRange
from .guided_output import GuidedOutput


@dataclass(frozen=True)
class Automatic:
    name = "automatic"

    def resolve(self, policy):
        return BlockRange() if policy.needs_forward else GuidedOutput()
