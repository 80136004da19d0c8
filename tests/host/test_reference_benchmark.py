"""The benchmark of the reference caches: what it compares with is the same function, and what it counts is what was promised."""
import json
from functools import cache

import pytest
import torch

from benchmarks import _easycontrol, _fastfit, _image_template, _klein, _published, _templates, _turns, reference_cache

TERA = 1e12
SYSTEMS = (_easycontrol, _fastfit, _templates, _image_template, _klein)


@cache
def short_rows(system) -> tuple:
    """All rows of a system, with two steps, one round and the smallest pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_turns, "STEPS", 2)
        patch.setattr(_turns, "ROUNDS", 1)
        patch.setattr(_fastfit, "TINY_SHARE", 8)
        return tuple(system.rows())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__.partition("_")[2])
def test_rows_have_every_field_and_ways_that_claim_the_same_picture_give_it(system):
    rows = short_rows(system)
    assert rows and len({(row["references"], row["shape"]) for row in rows}) == len(rows)
    for row in rows:
        assert set(reference_cache.FIELDS) <= set(row) and reference_cache.line(row)
        assert row["exactness"] == "exact" and row["wall_ratio"] > 0 and row["prefill_steps"] > 0
        assert row["effect"] > 0.05, "the references change nothing, so equal pictures prove nothing"
        for field in ("max_abs_error", "max_abs_error_public"):
            assert row.get(field, 0) <= 1e-4 * max(1, row["effect"]), field
        assert row["relative_error"] <= 1e-4


def test_the_command_runs_every_system():
    assert reference_cache.SYSTEMS == SYSTEMS


def test_the_table_that_is_kept_has_the_numbers_that_are_counted_now():
    kept, counted = json.loads(reference_cache.RESULTS.read_text(encoding="utf-8")), [row for system in SYSTEMS for row in short_rows(system)]
    assert len(kept) == len(counted)
    for there, now in zip(kept, counted, strict=True):
        fields = [field for field in now if "flops" in field or field.endswith("bytes") or field in ("system", "shape", "prefill_steps", "exactness")]
        assert {field: there[field] for field in fields} == {field: now[field] for field in fields}


def by_references(rows) -> dict[int, dict]:
    return {row["references"]: row for row in rows}


@pytest.mark.parametrize("references, official, ours, fewer", [(1, 90.9, 77.7, 1.15), (2, 107.4, 81.0, 1.3)])
def test_easycontrol_saves_what_was_promised_against_the_public_cache(references, official, ours, fewer):
    """The numbers by hand: two FLOPs for a product, 57 blocks of width 3072, 12 C^2 weights for a token and its attention to all it sees."""
    row = by_references(short_rows(_easycontrol))[references]
    assert (row["flops_without"] / TERA, row["flops_with"] / TERA) == pytest.approx((official, ours), abs=0.06)
    assert row["flops_without"] / row["flops_with"] >= fewer
    width, own, more, hidden = 3072, 512 + 4096, references * 1024, 4
    token = 2 * 57 * (4 + 2 * hidden) * width ** 2          # query, key, value, output and two layers of the MLP
    attention = 57 * 4 * own * (own + more) * width
    assert row["flops_without"] == pytest.approx(token * (own + more) + attention, rel=0.01)
    assert row["flops_with"] == pytest.approx(token * own + attention, rel=0.01)
    assert row["flops_prefill"] == pytest.approx(references * 14.0e12, rel=0.03)
    assert row["entry_bytes"] - row["formula_bytes"] == 3 * 4 * references * 1024      # places of the tokens
    assert row["formula_bytes"] == references * 717_225_984


def test_fastfit_halves_the_attention_of_the_public_path_at_every_outfit():
    rows = short_rows(_fastfit)
    assert [row["references"] for row in rows] == [1, 3, 3]
    for row in rows:
        assert row["flops_with"] < row["flops_without"] and row["flops_with"] < row["flops_recomputed"]
        assert row["attention_flops_without"] == 2 * row["attention_flops_with"]
        assert row["flops_without"] - row["flops_with"] == row["attention_flops_with"]
        assert row["entry_bytes"] == row["formula_bytes"]
        assert row["flops_recomputed"] == row["flops_with"] + row["flops_prefill"]
    assert (rows[1]["attention_flops_without"] / TERA, rows[1]["attention_flops_with"] / TERA) == pytest.approx((3.86, 1.93), abs=0.005)
    assert rows[0]["entry_bytes"] == round(33.046875 * 2 ** 20) and rows[1]["entry_bytes"] == 3 * rows[0]["entry_bytes"]


def test_tokens_of_a_template_pass_no_linear_layer_and_are_seen_as_the_formula_says():
    (row,) = short_rows(_templates)
    assert row["linear_flops_of_tokens"] == 0
    assert row["attention_flops_of_tokens"] == row["formula_attention_flops_of_tokens"] == 25 * 4 * 3072 * 4608 * 512
    assert row["flops_with"] - row["flops_plain"] == row["attention_flops_of_tokens"]
    assert row["flops_without"] - row["flops_with"] == row["flops_prefill"] == 50 * 2 * (256 + 3072) * 3072
    assert row["entry_bytes"] == row["formula_bytes"] == 307_200 * 512


def test_the_network_of_an_image_template_runs_once_and_its_tokens_pass_no_layer_of_the_model():
    (row,) = short_rows(_image_template)
    tokens = 512 + 4096
    assert row["linear_flops_of_tokens"] == 0 and row["flops_with"] - row["flops_plain"] == 25 * 4 * 3072 * tokens ** 2
    assert row["flops_without"] - row["flops_with"] == row["flops_prefill"] == row["flops_plain"]
    assert row["entry_bytes"] == row["formula_bytes"] == 307_200 * tokens == 1350 * 2 ** 20


@pytest.mark.parametrize("references", [1, 2])
def test_reference_latents_pass_no_layer_after_they_are_encoded(references):
    row = by_references(short_rows(_klein))[references]
    own, more, width, blocks = 512 + 4096, references * 4096, 4096, 32
    assert row["flops_with"] - row["flops_plain"] == blocks * 4 * own * more * width
    assert row["flops_without"] - row["flops_plain"] > row["flops_prefill"] > 0.5 * (row["flops_without"] - row["flops_plain"])
    assert row["formula_bytes"] == 512 * 1024 * more and row["entry_bytes"] - row["formula_bytes"] == 4 * 4 * more


def test_networks_on_the_meta_device_have_the_published_numbers_of_weights():
    nets = {11.9e9: _published.flux(_published.FLUX_DEV), 3.88e9: _published.flux(_published.KLEIN_4B), 9.08e9: _published.flux(_published.KLEIN_9B),
            815e6: _published.unet(_published.FASTFIT)}
    for published, net in nets.items():
        assert sum(weight.numel() for weight in net.parameters()) == pytest.approx(published, rel=0.01)
        assert all(weight.is_meta for weight in net.parameters())


def test_ways_are_timed_in_turn_and_the_first_round_is_not_counted(monkeypatch):
    order, seconds = [], iter(range(100))
    monkeypatch.setattr(_turns, "ROUNDS", 2)
    monkeypatch.setattr(_turns.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(_turns.time, "process_time", lambda: 0.0)
    timed = _turns.in_turn({name: lambda name=name: order.append(name) or torch.zeros(1) for name in "ab"})
    assert order == list("ab") * 3 and timed["a"].wall == 1
