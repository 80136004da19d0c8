"""The plot: picture dB against evaluations, a panel per cell, drawn with Pillow at twice its size and shrunk."""
import math
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from ._curves import Curve, curves
from ._verdict import OURS, named

PAPER, INK, FAINT = "#ffffff", "#222222", "#dddddd"
COLOURS = {OURS: "#d62728", "plain": "#444444", "mask": "#1f77b4", "host EasyCache": "#9467bd", "host LazyCache": "#8c564b"}
OTHERS = ("#2ca02c", "#ff7f0e", "#17becf", "#e377c2", "#bcbd22", "#7f7f7f", "#00a36c", "#4b0082", "#b8860b", "#5f9ea0")
PANEL, MARGIN, COLUMNS, TWICE = (330, 250), (42, 26, 10, 30), 6, 2     # margins: left, top, right, bottom
DECIBEL = (20, 75)
SHARE = (0.15, 0.85)


def plot(rows: Iterable[dict]) -> Image.Image:
    cells = sorted(curves(rows).items())
    names = list(dict.fromkeys([OURS, "plain", "mask", *sorted({curve.method for _, found in cells for curve in found})]))
    rest = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    colours = {name: COLOURS.get(name) or next(rest) for name in names}
    across = min(COLUMNS, max(len(cells), 2))
    down = math.ceil(len(cells) / across)
    width, height = across * PANEL[0], down * PANEL[1] + 60
    sheet = Image.new("RGB", (width * TWICE, height * TWICE), PAPER)
    draw = ImageDraw.Draw(sheet)
    legend(draw, colours, width)
    for i, (cell, found) in enumerate(cells):
        Panel(draw, (i % across * PANEL[0], 60 + i // across * PANEL[1]), cell[2]).draw(named(cell), found, colours)
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * TWICE)


def legend(draw, colours: dict, width: int) -> None:
    draw.text((10 * TWICE, 4 * TWICE), "Picture dB (up) against evaluations as a share of the steps, on prompts that nothing was chosen on", INK, font(12))
    x, y = 10, 26
    for name, colour in colours.items():
        wide = font(11).getlength(name) / TWICE + 36
        if x + wide > width:
            x, y = 10, y + 16
        draw.line([(x * TWICE, (y + 7) * TWICE), ((x + 18) * TWICE, (y + 7) * TWICE)], colour, 3 * TWICE)
        draw.text(((x + 22) * TWICE, y * TWICE), name, INK, font(11))
        x += wide


class Panel:
    """One cell's axes. The horizontal one is logarithmic, as that is how interpolation goes."""

    def __init__(self, canvas: ImageDraw.ImageDraw, corner: tuple[int, int], steps: int):
        self.canvas, self.steps = canvas, steps
        left, top, right, bottom = MARGIN
        self.left, self.top = corner[0] + left, corner[1] + top
        self.right, self.bottom = corner[0] + PANEL[0] - right, corner[1] + PANEL[1] - bottom

    def place(self, evaluations: float, decibel: float) -> tuple[float, float]:
        across = math.log(evaluations / self.steps / SHARE[0]) / math.log(SHARE[1] / SHARE[0])
        up = (min(max(decibel, DECIBEL[0]), DECIBEL[1]) - DECIBEL[0]) / (DECIBEL[1] - DECIBEL[0])
        return (self.left + across * (self.right - self.left)) * TWICE, (self.bottom - up * (self.bottom - self.top)) * TWICE

    def draw(self, title: str, found: list[Curve], colours: dict) -> None:
        self.canvas.text((self.left * TWICE, (self.top - 18) * TWICE), title, INK, font(10))
        for decibel in range(DECIBEL[0], DECIBEL[1] + 1, 10):
            self.rule(self.place(SHARE[0] * self.steps, decibel), self.place(SHARE[1] * self.steps, decibel), str(decibel), "rm")
        for share in (0.2, 0.3, 0.4, 0.6, 0.8):
            self.rule(self.place(share * self.steps, DECIBEL[0]), self.place(share * self.steps, DECIBEL[1]), f"{share:.0%}", "mt")
        for curve in sorted(found, key=lambda curve: curve.method == OURS):     # ours on top
            self.line(curve, colours[curve.method])

    def rule(self, start: tuple, end: tuple, text: str, anchor: str) -> None:
        self.canvas.line([start, end], FAINT, TWICE)
        away = (-4 * TWICE, 0) if anchor == "rm" else (0, 4 * TWICE)
        self.canvas.text((start[0] + away[0], start[1] + away[1]), text, INK, font(9), anchor)

    def line(self, curve: Curve, colour: str) -> None:
        """Every setting is a dot; the line joins those that were kept."""
        scored, thick = curve.points["score"], 1 + 2 * (curve.method == OURS)
        kept = self.places(scored[settings] for settings in curve.kept() if settings in scored)
        if len(kept) > 1:
            self.canvas.line(kept, colour, thick * TWICE, "curve")
        for x, y in self.places(scored.values()):
            r = (1 + thick / 2) * TWICE
            self.canvas.ellipse([x - r, y - r, x + r, y + r], colour)

    def places(self, rows: Iterable[dict]) -> list[tuple[float, float]]:
        inside = [row for row in rows if SHARE[0] <= row["evaluations"] / self.steps <= SHARE[1]]
        return sorted(self.place(row["evaluations"], row["psnr_image_db"]) for row in inside)
