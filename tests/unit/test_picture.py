"""The measure that the demo prints."""
import pytest
from PIL import Image

from testbed.picture import enlarged, psnr


def flat(*colour: int) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


def test_identical_pictures_have_no_psnr():
    assert psnr(flat(1, 2, 3), flat(1, 2, 3)) is None


def test_one_level_of_error_everywhere_is_48_db():
    assert psnr(flat(10, 20, 30), flat(11, 19, 31)) == pytest.approx(48.13, abs=0.01)


def test_psnr_averages_over_the_channels():
    assert psnr(flat(10, 20, 30), flat(13, 20, 30)) == pytest.approx(48.13 - 10 * 0.4771, abs=0.01)


def test_pictures_grow_by_a_whole_factor():
    assert enlarged(flat(0, 0, 0), 10).size == (12, 12)
    assert enlarged(flat(0, 0, 0), 4).size == (4, 4)
