"""Profiles: what is written is read again, and what strangers may send is refused in one sentence."""
import hashlib
import json
import math
import os
import pickle
import struct
from dataclasses import fields, replace
from pathlib import PurePosixPath, PureWindowsPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from pack.core.stepcache.profiles import Check, Facts, Plan, Polynomial, Profile, no_name, read, write
from pack.core.stepcache.profiles.files import MOST_JSON, MOST_TENSORS
from pack.core.stepcache.profiles.fits import fitted, polynomial
from pack.core.stepcache.profiles.recording import NAMES, OUTPUT, Recording
from pack.core.stepcache.profiles.words import described, percent

STEPS = 12
FACTS = Facts("flux", "Flux", "euler", tuple(1 - n / STEPS for n in range(STEPS + 1)), (16, 64, 96), 3.5, "bfloat16")


def made(steps: int = STEPS, seed: int = 0) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(steps, 40, dtype=torch.float64, generator=generator).cumsum(0)
    each = {name: (None, *torch.rand(steps - 1, generator=generator).tolist()) for name in NAMES}
    overlaps = d @ d.T / 100
    return Profile(
        replace(FACTS, sigmas=tuple(1 - n / steps for n in range(steps + 1))), True, (overlaps + overlaps.T) / 2, 4, True,
        (Check(6, 0.01, 0.02), Check(4, 0.02, 0.05)), (Plan((0, 3, 5, 7, steps - 1), 0.015, 0.03),), each,
        Polynomial("modulated input", (1.0, -2.0, 3.5, 0.25, 1e-3), 0.01), ((1.0, *torch.rand(steps - 1, generator=generator).tolist()),),
        "2025-11-20", "0.1.0")


def same(a: Profile, b: Profile) -> bool:
    return torch.equal(a.overlaps, b.overlaps) and all(getattr(a, f.name) == getattr(b, f.name) for f in fields(a) if f.name != "overlaps")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "reprise" / "profiles"


def refusal(folder, name="p") -> str:
    with pytest.raises(ValueError) as caught:
        read(folder, name)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 300, message
    return message


def edited(folder, change) -> str:
    """The sentence that comes back when a field of a good profile was changed."""
    path = write(folder, "p", made())
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return refusal(folder)


@pytest.mark.parametrize("steps", [9, 12, 60])
def test_what_is_written_is_read_again(folder, steps):
    profile = made(steps)
    assert write(folder, "p", profile).name == "p.json"
    assert same(read(folder, "p"), profile)
    assert sorted(path.name for path in folder.iterdir()) == ["p.json", "p.safetensors"]


def test_a_profile_takes_the_place_of_an_older_one(folder):
    write(folder, "p", made(12))
    write(folder, "p", made(20, seed=1))
    assert read(folder, "p").facts.steps == 20 and len(list(folder.iterdir())) == 2


def test_a_write_that_is_cut_short_leaves_nothing_of_itself(folder, monkeypatch):
    write(folder, "p", made())

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "p", made(seed=1))
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["p.json", "p.safetensors"] and same(read(folder, "p"), made())


@pytest.mark.parametrize("name", [
    "", ".", "..", "../p", "a/b", "a\\b", "/etc/passwd", "C:p", "a..b", ".hidden", "-p", "p\0", "p\n", "nul", "COM1", "con.x", "p" * 101, "a b", "ü",
    "p:stream", "p.", None, 3])
def test_a_name_cannot_leave_the_folder(folder, name):
    assert no_name(name).startswith("expected")
    for act in (lambda: read(folder, name), lambda: write(folder, name, made())):
        with pytest.raises(ValueError, match="profile name .* is refused; expected the name of a profile"):
            act()
    assert not folder.exists()


@given(st.text(max_size=30))
def test_a_name_that_passes_is_a_file_of_the_folder(name):
    if not no_name(name):
        for path in (PurePosixPath("/x") / f"{name}.json", PureWindowsPath("c:/x") / f"{name}.json"):
            assert path.name == f"{name}.json" and len(path.parts) == 3 and ".." not in path.parts


def test_a_profile_that_is_not_there_is_told_with_those_that_are(folder):
    assert "there is no profile 'p'; make one with Step Cache Calibrate" in refusal(folder)
    write(folder, "other", made())
    assert "there is no profile 'p'; known: other" in refusal(folder)


@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_what_is_no_file_is_no_profile_and_is_never_opened(folder, what):
    """A pipe that was opened would wait for ever."""
    def make(path):
        path.mkdir() if what == "folder" else os.mkfifo(path)

    if what == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    write(folder, "q", made())
    make(folder / "p.json")
    assert refusal(folder) == "there is no profile 'p'; known: q"
    write(folder, "r", made()).with_suffix(".safetensors").unlink()
    make(folder / "r.safetensors")
    assert "r.safetensors is no file" in refusal(folder, "r")


def test_what_cannot_be_a_profile_s_name_is_not_told_as_one(folder):
    write(folder, "q", made())
    (folder / "not a name.json").touch()
    assert refusal(folder) == "there is no profile 'p'; known: q"


def at(path):
    """A change of one field: at("made_for.cfg")(record, value)."""
    *way, last = path.split(".")

    def change(record, value):
        for key in way:
            record = record[int(key)] if isinstance(record, list) else record[key]
        record[last if isinstance(record, dict) else int(last)] = value
    return change


WRONG = [
    ("format", "other"), ("format", 3), ("version", 2), ("version", True), ("version", "1"), ("pictures", 0), ("pictures", 1.5), ("pictures", 10 ** 30),
    ("date", 3), ("pack", "x" * 1000), ("pack", "a\nb"), ("made_for", []), ("made_for.family", None), ("made_for.steps", 10 ** 6), ("made_for.steps", 12.0),
    ("made_for.steps", True), ("made_for.sigmas", [1.0] * 13), ("made_for.sigmas", list(range(13))), ("made_for.sigmas", [1.0]), ("made_for.sigmas", "1"),
    ("made_for.sigmas.3", None), ("made_for.sigmas.3", "0.7"), ("made_for.sigmas.3", 1e300), ("made_for.sigmas.3", -1), ("made_for.shape", [16, 64]),
    ("made_for.shape", [16, 64.5, 64]), ("made_for.shape", [16, 0, 64]), ("made_for.shape", [16, 2 ** 40, 64]), ("made_for.shape", [1] * 1000),
    ("made_for.cfg", "3.5"), ("made_for.cfg", 1e9), ("made_for.cfg", True), ("made_for.flow", 1), ("looks_back", 0), ("checks", {}), ("checks", [{}] * 100),
    ("checks.0", 3), ("checks.0.computed", 0), ("checks.0.computed", 13), ("checks.0.planned", -1), ("checks.1.measured", 1e300), ("refined", 1),
    ("refined", [{}] * 100), ("refined.0", []), ("refined.0.computed", None), ("refined.0.computed", []), ("refined.0.computed", [0, 5]),
    ("refined.0.computed", [0, 5, 3, 11]), ("refined.0.computed", [0, 3, 3, 11]), ("refined.0.computed", [0, 2.5, 11]), ("refined.0.computed", [0, 99]),
    ("refined.0.computed", [0] * 10 ** 5), ("refined.0.measured", None), ("refined.0.measured", -1), ("each", None), ("each.output", [0.1] * 11),
    ("each.output.2", "x"), ("each.output.2", -1), ("teacache", 3), ("teacache.coefficients", [1.0] * 4), ("teacache.coefficients.0", 1e300),
    ("magcache", {}), ("magcache", [[1.0] * 12] * 3), ("magcache", [[1.0] * 11]), ("magcache", [3]), ("tensors", "0" * 64), ("tensors", 0),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={str(value)[:20]}" for path, value in WRONG])
def test_a_field_that_is_not_as_it_should_be_is_named(folder, path, value):
    message = edited(folder, lambda record: at(path)(record, value))
    named = [part for part in path.split(".") if not part.isdecimal()][-1]
    assert (named in message or "safetensors" in message) and "calibrate again" in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '"' + "x" * MOST_JSON + '"'])
def test_numbers_that_are_none_and_text_without_end_are_refused(folder, number):
    path = write(folder, "p", made())
    path.write_text(path.read_text().replace('"pictures": 4', f'"pictures": {number}'))
    assert "calibrate again" in refusal(folder)


@pytest.mark.parametrize("where", ["", "made_for", "checks.0", "refined.0", "each", "teacache"])
def test_a_field_too_many_and_a_field_too_few_are_named(folder, where):
    def inside(record):
        for key in filter(None, where.split(".")):
            record = record[int(key)] if isinstance(record, list) else record[key]
        return record

    assert "extra" in edited(folder, lambda record: inside(record).update(extra=1))
    for field in inside(json.loads(write(folder, "p", made()).read_text())):
        assert f"{field}'" in edited(folder, lambda record, field=field: inside(record).pop(field))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_file_that_was_cut_off_is_refused(folder, suffix, share):
    path = write(folder, "p", made()).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    assert "calibrate again" in refusal(folder)


def test_a_missing_tensor_file_is_told(folder):
    write(folder, "p", made()).with_suffix(".safetensors").unlink()
    assert "cannot be read" in refusal(folder)


def with_tensors(folder, content: bytes) -> str:
    """The sentence for a JSON whose digest fits these tensors."""
    path = write(folder, "p", made())
    path.with_suffix(".safetensors").write_bytes(content)
    record = json.loads(path.read_text()) | {"tensors": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(record))
    return refusal(folder)


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def test_tensors_of_another_kind_are_refused_before_anything_large_is_made(folder):
    good = made().overlaps
    wrong = {"overlaps": good.float()}, {"overlaps": good[:5]}, {"overlaps": good.flatten()}, {"other": good}, {"overlaps": good, "more": good.clone()}, {}
    for bad in wrong:
        assert "does not hold one fp64 tensor 'overlaps' of 12 x 12" in with_tensors(folder, save({key: value.contiguous() for key, value in bad.items()}))
    for number in (math.nan, math.inf, 1e200):
        spoilt = good.clone()
        spoilt[3, 4] = number
        assert "numbers that no run gives" in with_tensors(folder, save({"overlaps": spoilt}))
    negative = good.clone()
    negative[5, 5] = -1.0
    assert "numbers that no run gives" in with_tensors(folder, save({"overlaps": negative}))
    huge = {"dtype": "F64", "shape": [10 ** 6, 10 ** 6], "data_offsets": [0, 8 * 10 ** 12]}
    assert "damaged" in with_tensors(folder, header(overlaps=huge) + b"\0" * 64)
    assert "damaged" in with_tensors(folder, struct.pack("<Q", 1 << 62) + b"{}")
    assert "more than" in with_tensors(folder, b"\0" * (MOST_TENSORS + 1))


def test_a_pickle_is_not_opened(folder, tmp_path):
    flag = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return flag.write_text, ("",)

    with_tensors(folder, pickle.dumps(Trap()))
    assert not flag.exists()


OTHER = {"family": "nextdit", "model": "NextDiT", "precision": "float16", "sampler": "dpmpp_2m", "cfg": 1.0, "shape": (16, 128, 128)}


@pytest.mark.parametrize("field", [*OTHER, "sigmas", "steps"])
def test_the_field_that_differs_is_named(field):
    other = dict(OTHER, sigmas=(1.0, 0.95, *FACTS.sigmas[2:]), steps=FACTS.sigmas[2:])
    run = replace(FACTS, **{"sigmas" if field == "steps" else field: other[field]})
    assert FACTS.differs(run).startswith("resolution: " if field == "shape" else f"{field}: ") and not FACTS.differs(FACTS)


def test_a_resolution_is_a_bucket_and_another_aspect_ratio_of_that_area_fits():
    assert not replace(FACTS, shape=(16, 128, 128)).differs(replace(FACTS, shape=(16, 112, 144)))
    assert "resolution" in replace(FACTS, shape=(16, 128, 128)).differs(replace(FACTS, shape=(16, 64, 64)))
    assert "resolution" in replace(FACTS, shape=(16, 5, 64, 64)).differs(replace(FACTS, shape=(16, 9, 64, 64)))


def test_a_guidance_that_has_no_scale_fits_no_profile():
    assert FACTS.differs(replace(FACTS, cfg=math.nan)) == "cfg: the run has a guidance of its own"


@given(st.floats(0.2, 30), st.floats(0.8, 2.5), st.floats(1e-3, 0.1))
def test_two_checks_tell_how_errors_grow(scale, power, planned):
    checks = tuple(Check(5, at, scale * at ** power) for at in (0.004, 0.02))
    profile = replace(made(), checks=checks)
    assert profile.expected(Plan((), planned)) == pytest.approx(scale * planned ** power, rel=1e-6)
    assert replace(profile, checks=checks[:1]).expected(Plan((), 0.004)) == pytest.approx(checks[0].measured)
    assert math.isnan(replace(profile, checks=()).expected(Plan((), planned))) and profile.expected(Plan((), 0.0)) == 0.0


@given(st.lists(st.floats(-50, 50), min_size=5, max_size=5), st.floats(0.02, 3.0), st.integers(0, 1000))
def test_the_polynomial_of_a_drift_that_follows_one_is_recovered(coefficients, largest, seed):
    x = (torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * largest)
    y = sum(c * x ** (4 - n) for n, c in enumerate(coefficients))
    found, error = polynomial(tuple(x.tolist()), tuple(y.tolist()))
    again = sum(c * x ** (4 - n) for n, c in enumerate(found))
    assert error < 1e-8 and torch.allclose(again, y, rtol=1e-7, atol=1e-7)
    assert found == pytest.approx(coefficients, rel=1e-3, abs=1e-4 / largest ** 4)


def test_the_fit_takes_the_first_signal_that_is_known_and_leaves_unknown_steps_out():
    recording = Recording(None)
    recording.each = {OUTPUT: [None, *(2 * n * n * 0.01 + 0.1 for n in range(1, 9))], "first block": [None, *(0.1 * n for n in range(1, 9))],
                      "modulated input": [None] * 9}
    fit = fitted([recording], ("modulated input", "first block"))
    assert fit.signal == "first block" and fit.coefficients == pytest.approx((0, 0, 2, 0, 0.1), abs=1e-6)
    assert fitted([recording], ("modulated input",)) is None


def test_a_refined_schedule_takes_the_place_of_the_plan_where_the_run_allows_it():
    profile = made()
    refined = profile.refined[0]
    anything = [True] * STEPS
    assert profile.plans(5, anything, True)[5] is refined and profile.expected(refined) == refined.measured
    forbidden = [n != 4 for n in range(STEPS)]
    for plans in (profile.plans(2, anything, True), profile.plans(5, forbidden, True), profile.plans(5, anything, False)):
        assert refined not in plans.values()
    assert replace(profile, refined=()).plans(5, anything, True)[5].computed != refined.computed


@pytest.mark.parametrize(("error", "said"), [
    (0.00034, "0.034%"), (0.0004, "0.040%"), (0.000999, "0.10%"), (0.0123, "1.2%"), (0.0996, "10%"), (0.05, "5.0%"), (0.333, "33%"), (1.5, "150%"),
    (0.0, "0%"), (1e-9, "0.00000010%")])
def test_an_error_is_told_with_two_digits_that_count(error, said):
    assert percent(error) == said


@given(st.floats(1e-9, 9.0))
def test_the_error_that_is_told_is_within_one_in_twenty(error):
    assert float(percent(error).rstrip("%")) / 100 == pytest.approx(error, rel=0.051)


def test_the_text_tells_small_errors_and_counts_one_as_one():
    profile = replace(made(), checks=(Check(1, 0.0001, 0.00034),), refined=(Plan((0, 11), 0.0001, 0.00021),))
    text = described("p", profile, {6: Plan((0, 2, 4, 6, 8, 11), 0.0001)})
    assert "measured with 1 computed step: error 0.034% of the latent" in text and "bettered by trials: 2 computed steps, error 0.021%" in text
    assert "2x: 6 computed steps, 0, 2, 4, 6, 8, 11, expected error 0.034% of the latent" in text


def test_an_error_that_no_check_tells_is_left_out_of_the_text():
    profile = replace(made(), checks=(Check(6, 0.0, 0.01),))
    assert "nan" not in described("p", profile, {6: Plan((0, 2, 4, 6, 8, 11), 0.01)})


@pytest.mark.parametrize("field", ["\x1b[31mred\x1b[0m", "two\nlines", "\u202eright to left", "\ud800", "long" * 100])
def test_a_field_name_that_would_write_to_a_terminal_is_shown_and_not_obeyed(folder, field):
    said = edited(folder, lambda record: record.update({field: 1}))
    assert said.isprintable() and "which is not known" in said
