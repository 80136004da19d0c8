"""What is wanted of a card: the rows of a result of `bench gpu` against its thresholds."""
import pytest

from benchmarks import _gpu_nodes as nodes
from benchmarks._gpu_kernels import KITCHEN_FROM_BF16, OWN, OWN_FROM_BF16
from benchmarks._gpu_subjects import INT8
from benchmarks._gpu_verdict import CARDS, MET, MISSED, NODES_ALL, NODES_FUSED, NORMS, OPEN, SAGE, line, verdicts

GOOD_SHARE = {"bytes": 3_000_000, "fused_us": 1.0, "host_us": 3.0}      # 3 of 4.8 TB/s


def kernel(name: str, case: str = "FLUX 1024px", **more) -> dict:
    return {"kernel": name, "case": case, **GOOD_SHARE, **more}


def product(way: str, tops: float, shape: str = "4352 x 3072 x 21504") -> dict:
    return {"way": way, "shape": shape, "tops": tops}


def step(ms: float, names: str = nodes.PLAIN, *told: str) -> dict:
    return {"model": "FLUX.1", "format": INT8, "nodes": names, "median_ms": ms, "told": list(told)}


def block(share: float, spoken: str) -> dict:
    return {"model": "FLUX.1", "format": INT8, "nodes": NODES_FUSED, "block": spoken, "text_tokens": 256, "ms": 1.0,
            "share": {"products": 0.5, "attention": 0.5 - share, "elementwise": share}}


def h200() -> dict:
    """A result that is good enough in everything."""
    return {
        "machine": {"gpu": "NVIDIA H200"},
        "kernels": [*map(kernel, NORMS), kernel("activate to int8", fused_us=0.8),
                    kernel("gguf codes", "Q4_K, FLUX qkv", bytes=3_200_000), kernel("gguf codes", "Q6_K, FLUX qkv", bytes=1)],
        "products": [product(OWN, 1200.0), product(OWN_FROM_BF16, 1000.0), product(KITCHEN_FROM_BF16, 900.0), product(OWN, 10.0, "4192 x 3840 x 10240")],
        "blocks": [block(0.1, "double-stream"), block(0.11, "single-stream")],
    }


def geforce(number: int) -> dict:
    fast = {4090: (280.0, 220.0, 170.0), 5090: (190.0, 160.0, 120.0)}[number]
    return {
        "machine": {"gpu": f"NVIDIA GeForce RTX {number}"}, "products": [product(OWN, 530.0), product(OWN, 100.0, "4352 x 3072 x 3072")],
        "model": [step(fast[0]), step(fast[1], NODES_FUSED), step(fast[2], NODES_ALL, f"Attention Backend: {SAGE} 1026 of 1140 calls")],
    }


def judged(content: dict) -> dict[str, str]:
    return {each["what"]: each["verdict"] for each in verdicts(content)["verdicts"]}


@pytest.mark.parametrize("content", [h200(), geforce(4090), geforce(5090)], ids=lambda content: content["machine"]["gpu"])
def test_a_card_that_does_what_was_wanted_meets_every_line(content):
    found = verdicts(content)["verdicts"]
    assert found and {each["verdict"] for each in found} == {MET}, found
    assert all(each["measured"] is not None and each["where"] and "MET" in line(each) for each in found)


def worse(content: dict, section: str, place: int, **numbers) -> dict:
    rows = [dict(row) for row in content[section]]
    rows[place] |= numbers
    return {**content, section: rows}


BELOW = {
    "norms and gates: share of 4.8 TB/s": worse(h200(), "kernels", 3, bytes=2_800_000),
    "norms and gates: against the host's operations": worse(h200(), "kernels", 0, host_us=2.4),
    "activations to int8: share of 4.8 TB/s": worse(h200(), "kernels", 4, fused_us=0.9),
    "Q4_K to int8: share of 4.8 TB/s": worse(h200(), "kernels", 5, bytes=3_000_000),
    "int8 product at FLUX shapes: share of 1979 TOPS": worse(h200(), "products", 0, tops=1080.0),
    "int8 product from bf16 against comfy_kitchen's": worse(h200(), "products", 2, tops=1001.0),
    "int8 block of FLUX.1 with Fused Kernels: neither products nor attention": worse(
        h200(), "blocks", 1, share={"products": 0.5, "attention": 0.37, "elementwise": 0.13}),
    "int8 product 4352 x 3072 x 21504": worse(geforce(4090), "products", 0, tops=519.0),
    "step of FLUX.1 in int8": worse(geforce(4090), "model", 0, median_ms=291.0),
    "step of FLUX.1 in int8 with Fused Kernels": worse(geforce(5090), "model", 1, median_ms=171.0),
    "step of FLUX.1 in int8 with Fused Kernels and SageAttention 2": worse(geforce(5090), "model", 2, median_ms=131.0),
}


@pytest.mark.parametrize("what", BELOW)
def test_the_worst_row_decides_and_no_other_line_is_touched(what):
    found = judged(BELOW[what])
    assert found.pop(what) == MISSED and set(found.values()) == {MET}


def test_every_line_has_a_result_that_misses_it():
    assert {wanted.what for lines in CARDS.values() for wanted in lines} == set(BELOW)


def test_what_was_not_measured_is_not_judged():
    content = h200()
    for place, row in enumerate(content["kernels"]):
        if row["kernel"] == "modulate":
            content["kernels"][place] = {"kernel": "modulate", "case": "FLUX 1024px", "failed": "out of memory"}
    found = judged(content)
    missing = [what for what, verdict in found.items() if verdict == OPEN]
    assert missing == ["norms and gates: share of 4.8 TB/s", "norms and gates: against the host's operations"]
    assert set(judged({"machine": {"gpu": "NVIDIA H200"}}).values()) == {OPEN}
    assert all("NOT MEASURED" in line(each) for each in verdicts({"machine": {"gpu": "NVIDIA H200"}})["verdicts"])


def test_a_row_with_another_attention_is_not_taken_for_sageattention():
    content = worse(geforce(4090), "model", 2, told=["Attention Backend: SDPA served 1026 of 1140 calls"])
    assert judged(content)["step of FLUX.1 in int8 with Fused Kernels and SageAttention 2"] == OPEN


OTHERS = ("", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090", "NVIDIA H100", "AMD Radeon RX 7900")


@pytest.mark.parametrize("gpu", OTHERS)
def test_of_other_cards_there_are_numbers_only(gpu):
    assert verdicts({**h200(), "machine": {"gpu": gpu}}) == {"verdicts": []}
