"""Pictures beside one another, with words under them; and how far two of them are apart."""
import math

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

PAPER, INK = "#16161a", "#e8e8ea"
GAP = 12
TEXT = 15


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """dB between two 8-bit RGB pictures; None when they are identical."""
    squares = ImageStat.Stat(ImageChops.difference(a, b)).sum2
    error = sum(squares) / (len(squares) * a.width * a.height)
    return 10 * math.log10(255 ** 2 / error) if error else None


def difference(a: Image.Image, b: Image.Image, gain: int = 32) -> Image.Image:
    return ImageChops.difference(a, b).point(lambda value: min(255, value * gain))


def enlarged(picture: Image.Image, least: int) -> Image.Image:
    """The picture times the smallest whole number that makes it at least `least` pixels wide."""
    factor = max(1, math.ceil(least / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture over its caption, in a font small enough for the longest line."""
    longest = max(caption.splitlines(), key=len)
    size = TEXT
    while size > 8 and font(size).getlength(longest) > picture.width:
        size -= 1
    height = (size + 6) * len(caption.splitlines()) + 8
    sheet = Image.new("RGB", (picture.width, picture.height + height), PAPER)
    sheet.paste(picture)
    ImageDraw.Draw(sheet).multiline_text((sheet.width / 2, picture.height + 6), caption, INK, font(size), "ma", spacing=6, align="center")
    return sheet


def row(pictures: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, max(p.height for p in pictures)), PAPER)
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + GAP
    return sheet


def column(pictures: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + GAP for p in pictures) - GAP), PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height + GAP
    return sheet


def framed(sheet: Image.Image) -> Image.Image:
    frame = Image.new("RGB", (sheet.width + 2 * GAP, sheet.height + 2 * GAP), PAPER)
    frame.paste(sheet, (GAP, GAP))
    return frame


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
