"""Hold: the last snapshot stands in as it is (TeaCache, first-block cache, EasyCache and MagCache all do this).

    out = H_0
"""
from dataclasses import dataclass

from .base import Predictor, distance, newest


@dataclass(frozen=True)
class Hold(Predictor):
    name = "hold"

    def weights(self, past, at, gram=None) -> list[float]:
        return newest(len(past))

    def reach(self, past, at) -> float:
        return distance(past, at)
