"""None: the prediction stands in as it is."""
from dataclasses import dataclass


@dataclass(frozen=True)
class NoCorrection:
    name = "none"

    def start(self):
        return None
