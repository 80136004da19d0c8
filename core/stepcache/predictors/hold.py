"""Hold: the last snapshot stands in as it is (TeaCache, first-block cache, EasyCache and MagCache all do this).

    out = H_0
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Hold:
    name = "hold"
    history = 1

    def weights(self, past, at) -> list[float]:
        return [1.0]

    def reach(self, past, at) -> float:
        return abs(at.place - past[-1].place)

    def candidates(self):
        return (self,)
