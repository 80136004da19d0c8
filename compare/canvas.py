"""A sheet to draw charts on: Pillow's lines are not smooth, so all is drawn larger and reduced at the end."""
from PIL import Image, ImageDraw

from .sheet import INK, PAPER, TEXT, font

FINER = 2   # times


class Canvas:
    """Coordinates are pixels of the finished picture; y grows downwards."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * FINER, height * FINER), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def finished(self) -> Image.Image:
        return self.image.reduce(FINER)

    def text(self, x: float, y: float, words: str, colour: str = INK, anchor: str = "la", size: int = TEXT) -> None:
        self.draw.text((x * FINER, y * FINER), words, colour, font(size * FINER), anchor)

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 1) -> None:
        self.draw.line([(x * FINER, y * FINER) for x, y in points], colour, round(width * FINER), "curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle((round(left * FINER), round(top * FINER), round(right * FINER) - 1, round(bottom * FINER) - 1), colour)

    def dot(self, x: float, y: float, colour: str, radius: float = 4, hollow: bool = False) -> None:
        self.draw.circle((x * FINER, y * FINER), radius * FINER, PAPER if hollow else colour, colour, 2 * FINER if hollow else 0)
