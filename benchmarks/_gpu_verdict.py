"""What was wanted of a card, and whether it was met: lines of `bench gpu`.

The numbers were set before anything was timed: shares of what a card can do for the H200, modelled times for RTX 4090 and 5090.
Of a card without numbers nothing is judged.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import _gpu_nodes as nodes
from benchmarks._gpu_kernels import KITCHEN_FROM_BF16, OWN, OWN_FROM_BF16
from benchmarks._gpu_subjects import INT8

Rows = list[tuple[str, float | None]]       # (what was measured, its number)
MET, MISSED, OPEN = "met", "missed", "not measured"
SAGE = "SageAttention 2 served"             # what Attention Backend says when it was at work
NODES_FUSED, NODES_ALL = nodes.spoken((nodes.FUSED,)), nodes.spoken((nodes.FUSED, nodes.ATTENTION))


@dataclass(frozen=True)
class Wanted:
    """Of every row that `find` gives, at least or at most `bound`. Nothing is judged before all of them are there."""

    what: str
    find: Callable[[dict], Rows]
    bound: float
    unit: str
    least: bool = True

    def judge(self, content: dict) -> dict:
        rows = self.find(content)
        numbers = [number for _, number in rows if number is not None]
        verdict = {"what": self.what, "wanted": f"{'at least' if self.least else 'at most'} {self.bound:g} {self.unit}", "measured": None, "where": ""}
        if not numbers or len(numbers) < len(rows):
            return {**verdict, "verdict": OPEN}
        where, worst = (min if self.least else max)(rows, key=lambda row: row[1])
        met = worst >= self.bound if self.least else worst <= self.bound
        return {**verdict, "measured": round(worst, 4), "where": where, "verdict": MET if met else MISSED}


def such(content: dict, section: str, **wanted) -> list[dict]:
    """Rows of a section that have these values; failed ones too, so that they count as not measured."""
    return [row for row in content.get(section, []) if all(row.get(key) == value for key, value in wanted.items())]


def of_kernels(names: tuple[str, ...], number: Callable[[dict], float], case: str = "") -> Callable[[dict], Rows]:
    """Of the rows of each of these kernels, and of kernels that are missing None."""
    def find(content: dict) -> Rows:
        found: Rows = []
        for name in names:
            rows = [row for row in such(content, "kernels", kernel=name) if row["case"].startswith(case)]
            found += [(f"{name}, {row['case']}", None if "failed" in row else number(row)) for row in rows] or [(name, None)]
        return found
    return find


def bandwidth(peak: float) -> Callable[[dict], float]:
    """Percent of `peak`, TB/s, counting the bytes that must move."""
    return lambda row: 100 * row["bytes"] / row["fused_us"] / 1e6 / peak


def against_host(row: dict) -> float:
    return row["host_us"] / row["fused_us"]


def tops(way: str, shape: str = "") -> Callable[[dict], Rows]:
    def find(content: dict) -> Rows:
        rows = [row for row in such(content, "products", way=way) if shape in ("", row["shape"]) and row["shape"].startswith("4352 ")]
        return [(row["shape"], row.get("tops")) for row in rows]
    return find


def percent(find: Callable[[dict], Rows], whole: float) -> Callable[[dict], Rows]:
    return lambda content: [(where, None if number is None else 100 * number / whole) for where, number in find(content)]


def against_kitchen(content: dict) -> Rows:
    theirs = {row["shape"]: row.get("tops") for row in such(content, "products", way=KITCHEN_FROM_BF16)}
    pairs = [(row["shape"], row.get("tops"), theirs.get(row["shape"])) for row in such(content, "products", way=OWN_FROM_BF16)]
    return [(shape, mine / other if mine and other else None) for shape, mine, other in pairs]


def elementwise(content: dict) -> Rows:
    rows = [row for row in such(content, "blocks", model="FLUX.1", format=INT8, nodes=NODES_FUSED) if "share" in row or "failed" in row]
    where = lambda row: f"{row.get('block', '')}, {row.get('text_tokens', '')} text tokens"
    return [(where(row), 100 * row["share"]["elementwise"] if row.get("share") else None) for row in rows]


def step(names: str, said: str = "") -> Callable[[dict], Rows]:
    """ms of a step of the int8 model; where `said` was not said by a node, it is not the row that was meant."""
    def find(content: dict) -> Rows:
        rows = such(content, "model", format=INT8, nodes=names)
        return [(names, row["median_ms"] if row.get("median_ms") and said in " ".join(row["told"]) else None) for row in rows]
    return find


def of_geforce(as_it_is: float, fused: float, all_of_it: float, *more: Wanted) -> tuple[Wanted, ...]:
    return (
        *more,
        Wanted("step of FLUX.1 in int8", step(nodes.PLAIN), as_it_is, "ms", least=False),
        Wanted("step of FLUX.1 in int8 with Fused Kernels", step(NODES_FUSED), fused, "ms", least=False),
        Wanted("step of FLUX.1 in int8 with Fused Kernels and SageAttention 2", step(NODES_ALL, SAGE), all_of_it, "ms", least=False),
    )


NORMS = ("modulate", "modulate to int8", "gated residual to int8", "sandwich residual to int8")
H200_TB_PER_S, H200_TOPS = 4.8, 1979.0
CARDS = {       # a pattern of the card's name -> what is wanted of it
    r"\bH200\b": (
        Wanted("norms and gates: share of 4.8 TB/s", of_kernels(NORMS, bandwidth(H200_TB_PER_S)), 60, "%"),
        Wanted("norms and gates: against the host's operations", of_kernels(NORMS, against_host), 2.5, "times as fast"),
        Wanted("activations to int8: share of 4.8 TB/s", of_kernels(("activate to int8",), bandwidth(H200_TB_PER_S)), 75, "%"),
        Wanted("Q4_K to int8: share of 4.8 TB/s", of_kernels(("gguf codes",), bandwidth(H200_TB_PER_S), "Q4_K"), 65, "%"),
        Wanted("int8 product at FLUX shapes: share of 1979 TOPS", percent(tops(OWN), H200_TOPS), 55, "%"),
        Wanted("int8 product from bf16 against comfy_kitchen's", against_kitchen, 1, "times as fast"),
        Wanted("int8 block of FLUX.1 with Fused Kernels: neither products nor attention", elementwise, 12, "% of its time", least=False),
    ),
    r"\bRTX 4090\b(?! (?:D|Laptop))": of_geforce(290, 230, 175, Wanted("int8 product 4352 x 3072 x 21504", tops(OWN, "4352 x 3072 x 21504"), 520, "TOPS")),
    r"\bRTX 5090\b(?! (?:D|Laptop))": of_geforce(200, 170, 130),
}


def verdicts(content: dict) -> dict:
    """What the file says of the card that it is of."""
    gpu = content.get("machine", {}).get("gpu", "")
    wanted = next((wanted for pattern, wanted in CARDS.items() if re.search(pattern, gpu)), ())
    return {"verdicts": [each.judge(content) for each in wanted]}


def line(verdict: dict) -> str:
    measured = "" if verdict["measured"] is None else f": {verdict['measured']:g} ({verdict['where']})"
    return f"{verdict['verdict'].upper():12} {verdict['what']}, {verdict['wanted']}{measured}"
