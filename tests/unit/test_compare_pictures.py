"""What may be compared, what is refused in one sentence, and the sheets that show it."""
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pack.compare.comparison import compare
from pack.compare.pictures import batch_of, difference, image_of, tensor_of
from pack.compare.sheet import GAP, MOST, PAPER, SHOWN, enlarged, fitted
from pack.core.report import Evaluation, Report


def batch(pictures: int = 1, height: int = 16, width: int = 24, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand((pictures, height, width, channels), generator=torch.Generator().manual_seed(seed))


def spoilt(value: float) -> torch.Tensor:
    picture = batch(2)
    picture[1, 3, 4, 0] = value
    return picture


@pytest.mark.parametrize(("a", "b", "said"), [
    (batch(2), batch(3), ("image A has 2 pictures and image B 3;", "connect")),
    (batch(1), batch(2), ("image A has 1 picture and image B 2;", "connect")),
    (batch(width=24), batch(width=32), ("image A is 24 x 16 and image B 32 x 16", "scale")),
    (batch(), batch()[0], ("image B has the shape [16, 24, 3]", "connect")),
    (batch(channels=2), batch(channels=2), ("image A has the shape [1, 16, 24, 2]", "channels")),
    (batch()[:0], batch()[:0], ("image A has the shape [0, 16, 24, 3]", "connect")),
    (batch(2), spoilt(float("nan")), ("picture 2 of image B has 1 value that is NaN or infinite", "look for")),
    (torch.full((1, 2, 1, 3), float("nan")), batch(1, 2, 1), ("picture 1 of image A has 6 values that are NaN or infinite", "look for")),
    (spoilt(float("inf")), batch(2), ("picture 2 of image A has 1 value that is NaN or infinite", "look for")),
])
def test_what_cannot_be_compared_is_refused_in_one_sentence(a, b, said):
    with pytest.raises(ValueError) as caught:
        compare(a, b)
    message = str(caught.value)
    assert all(part in message for part in said) and "\n" not in message and len(message) < 250


def test_alpha_is_left_out_and_said():
    a, b = batch(channels=4), batch(channels=4, seed=1)
    found, without = compare(a, b), compare(a[..., :3], b[..., :3])
    assert found.scores == without.scores == compare(a, b[..., :3]).scores
    assert found.sheets[0].tobytes() == without.sheets[0].tobytes()
    assert "Alpha is left out" in found.text and "Alpha" not in without.text


def test_one_channel_is_grey():
    a, b = batch(channels=1), batch(channels=1, seed=1)
    assert compare(a, b).scores == compare(a.expand(-1, -1, -1, 3), b).scores


def test_values_beyond_the_picture_are_clamped_and_said():
    a, b = batch(), batch(seed=1)
    beyond = a * 3 - 1
    found = compare(beyond, b)
    assert found.scores == compare(beyond.clamp(0, 1), b).scores and "Image A has values beyond" in found.text
    assert "Images A and B have values beyond" in compare(beyond, beyond).text and "beyond" not in compare(a, b).text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_is_measured_in_float32(dtype):
    a, b = batch().to(dtype), batch(seed=1).to(dtype)
    assert compare(a, b).scores == compare(a.float(), b.float()).scores


def test_inputs_stay_as_they_were():
    a, b = batch(2) * 2, batch(2, seed=1)
    kept = a.clone(), b.clone()
    compare(a, b)
    assert a.equal(kept[0]) and b.equal(kept[1])


def test_each_picture_has_a_sheet_and_all_sheets_one_size(monkeypatch):
    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(haarpsi=lambda a, b: torch.tensor(0.5), mdsi=lambda a, b: torch.tensor(0.5)))
    a, b = batch(3), batch(3, seed=1)
    b[1] = a[1]     # its caption is longer, so that its font is smaller and the sheet lower
    done = []
    found = compare(a, b, progress=done.append)
    assert len(found.sheets) == 3 and len({sheet.size for sheet in found.sheets}) == 1 and done == [1, 2, 3]
    assert batch_of(found.sheets).shape == (3, found.sheets[0].height, found.sheets[0].width, 3)
    assert "1: PSNR" in found.text and "2: PSNR 120.00 dB (equal)" in found.text and "mean: " in found.text


def panels(sheet: Image.Image) -> list[tuple[int, int, int]]:
    """The colour in the middle of each of three pictures that are `SHOWN` wide."""
    return [sheet.getpixel((GAP + column * (SHOWN + GAP) + SHOWN // 2, GAP + SHOWN // 2)) for column in range(3)]


def test_a_sheet_shows_a_then_b_then_the_difference_times_the_gain():
    a, b = (torch.tensor(colour).expand(1, 8, 8, 3) / 255 for colour in ((10.0, 20.0, 30.0), (13.0, 20.0, 28.0)))
    assert panels(compare(a, b, gain=32).sheets[0]) == [(10, 20, 30), (13, 20, 28), (96, 0, 64)]
    assert panels(compare(a, b, gain=255).sheets[0])[2] == (255, 0, 255), "what is too bright to show is white, not dark"


def test_differences_below_a_level_of_eight_bits_can_be_seen():
    a = torch.full((1, 8, 8, 3), 0.5)
    assert panels(compare(a, a + 0.0012, gain=100).sheets[0])[2] == (31, 31, 31)


def test_captions_tell_what_the_runs_cost():
    report = Report(each=[Evaluation(1.0, True, 1.0), Evaluation(0.5, False, 0.0)], seconds=2)
    plain = compare(batch(), batch(seed=1)).sheets[0]
    told = compare(batch(), batch(seed=1), (report, Report(state="off", reason="x"))).sheets[0]
    assert plain.size == told.size and plain.tobytes() != told.tobytes()


@pytest.mark.parametrize(("size", "shown"), [
    ((1, 1), (384, 384)), ((128, 128), (384, 384)), ((300, 200), (600, 400)), ((1024, 768), (1024, 768)),
    ((4096, 2048), (1024, 512)), ((64, 1000), (SHOWN, 1000)), ((1, 4096), (SHOWN, 1024)), ((4096, 1), (1024, 1)),
])
def test_pictures_are_shown_at_a_size_that_can_be_read_in_their_own_proportions(size, shown):
    assert fitted(Image.new("RGB", size)).size == shown and max(shown) <= MOST


def test_a_narrow_picture_stands_in_the_middle_of_its_paper():
    picture = fitted(Image.new("RGB", (2, 1000), "white"))
    assert picture.getpixel((SHOWN // 2, 500)) == (255, 255, 255)
    assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel((0, 500))) == PAPER


def test_pictures_grow_by_a_whole_factor():
    assert enlarged(Image.new("RGB", (4, 4)), 10).size == (12, 12)
    assert enlarged(Image.new("RGB", (4, 4)), 4).size == (4, 4)


def test_eight_bit_pictures_come_back_as_they_were():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    picture = Image.fromarray(values[0].numpy())
    assert image_of(tensor_of(picture)).tobytes() == picture.tobytes()
    assert (batch_of([picture]) * 255).equal(values.float())


def test_the_difference_of_eight_bit_pictures_is_exact():
    a, b = (torch.randint(0, 256, (1, 3, 9, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = ((a - b).abs() * 32).clamp(max=255)
    assert (difference(a / 255, b / 255, 32) * 255).round().equal(expected.float())
