"""Pictures beside one another, with words under them."""
import math

from PIL import Image, ImageDraw, ImageFont

PAPER, INK = "#16161a", "#e8e8ea"
GAP = 12
TEXT = 15
SHOWN = 384     # pixels that a picture on a sheet is wide, at least
MOST = 1024     # and that its longer side has, at most


def enlarged(picture: Image.Image, least: int) -> Image.Image:
    """The picture times the smallest whole number that makes it at least `least` pixels wide."""
    factor = max(1, math.ceil(least / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def fitted(picture: Image.Image) -> Image.Image:
    """The picture at a size that shows its pixels and leaves room for a caption, its own proportions kept."""
    longer = max(picture.size)
    factor = min(math.ceil(SHOWN / picture.width), MOST // longer) or MOST / longer     # a whole number wherever it fits
    resized = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.LANCZOS)
    if resized.width >= SHOWN:
        return resized
    centred = Image.new("RGB", (SHOWN, resized.height), PAPER)
    centred.paste(resized, ((SHOWN - resized.width) // 2, 0))
    return centred


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture over its caption, in a font that suits its width and is small enough for the longest line."""
    longest = max(caption.splitlines(), key=len)
    size = max(TEXT, picture.width // 45)
    while size > 8 and font(size).getlength(longest) > picture.width:
        size -= 1
    height = (size + 6) * len(caption.splitlines()) + 8
    sheet = Image.new("RGB", (picture.width, picture.height + height), PAPER)
    sheet.paste(picture)
    ImageDraw.Draw(sheet).multiline_text((sheet.width / 2, picture.height + 6), caption, INK, font(size), "ma", spacing=6, align="center")
    return sheet


def side_by_side(a: Image.Image, b: Image.Image, apart: Image.Image, captions: tuple[str, str, str]) -> Image.Image:
    """Two pictures and their difference, each over its caption."""
    return row([captioned(fitted(picture), caption) for picture, caption in zip((a, b, apart), captions, strict=True)])


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


def level(sheets: list[Image.Image]) -> list[Image.Image]:
    """The sheets on paper of one height, as a batch wants them; their widths are equal."""
    height, papers = max(sheet.height for sheet in sheets), []
    for sheet in sheets:
        papers.append(Image.new("RGB", (sheet.width, height), PAPER))
        papers[-1].paste(sheet)
    return papers


def framed(sheet: Image.Image) -> Image.Image:
    frame = Image.new("RGB", (sheet.width + 2 * GAP, sheet.height + 2 * GAP), PAPER)
    frame.paste(sheet, (GAP, GAP))
    return frame


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
