"""Captioned pictures drawn on the fly: "<size> <colour> <shape> <place> <ground colour> <ground>", 16,200 captions."""
import math

import torch
from torch import Generator, Tensor

COLOURS = {
    "red": (0.90, 0.12, 0.12), "green": (0.10, 0.65, 0.20), "blue": (0.12, 0.25, 0.90), "yellow": (0.98, 0.88, 0.10),
    "magenta": (0.85, 0.15, 0.80), "cyan": (0.10, 0.80, 0.85), "orange": (1.0, 0.55, 0.05), "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.06), "gray": (0.5, 0.5, 0.5),
}
NAMES = list(COLOURS)
VALUES = torch.tensor([COLOURS[name] for name in NAMES])
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
PLACES = ("left", "center", "right")
GROUNDS = ("plain", "gradient", "checker", "stripes", "dots")


def caption(attributes) -> str:
    size, colour, shape, place, ground_colour, ground = attributes
    return f"{SIZES[size]} {NAMES[colour]} {SHAPES[shape]} {PLACES[place]} {NAMES[ground_colour]} {GROUNDS[ground]}"


def sample_attributes(n: int, g: Generator) -> Tensor:
    """[n, 6] indices in the order of `caption`; the ground never has the colour of the shape."""
    colour = torch.randint(0, len(NAMES), (n,), generator=g)
    ground_colour = (colour + torch.randint(1, len(NAMES), (n,), generator=g)) % len(NAMES)
    return torch.stack([
        torch.randint(0, 2, (n,), generator=g), colour, torch.randint(0, len(SHAPES), (n,), generator=g),
        torch.randint(0, 3, (n,), generator=g), ground_colour, torch.randint(0, len(GROUNDS), (n,), generator=g),
    ], 1)


def render(attributes: Tensor, px: int, g: Generator) -> Tensor:
    """Pictures [n, 3, px, px] in [0, 1], antialiased from signed distances; position, angle and pattern vary with `g`."""
    n = attributes.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, 1, 1, generator=g) * (high - low) + low

    axis = (torch.arange(px) + 0.5) / px * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x[None], y[None]
    size = torch.where(attributes[:, 0].view(n, 1, 1) == 0, uniform(0.26, 0.34), uniform(0.46, 0.56))
    centre_x = (attributes[:, 3].view(n, 1, 1).float() - 1) * 0.38 + uniform(-0.06, 0.06)
    centre_y = uniform(-0.18, 0.18)
    angle = uniform(-0.35, 0.35)
    dx, dy = x - centre_x, y - centre_y
    u, v = dx * angle.cos() + dy * angle.sin(), -dx * angle.sin() + dy * angle.cos()
    radius = (dx * dx + dy * dy).sqrt()
    distances = torch.stack([
        radius - size,
        torch.maximum(u.abs(), v.abs()) - size * 0.88,
        torch.maximum(v - size * 0.65, torch.maximum(0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v) - size * 0.65),
        (radius - size * 0.75).abs() - size * 0.25,
        torch.minimum(torch.maximum(u.abs() - size * 0.32, v.abs() - size), torch.maximum(v.abs() - size * 0.32, u.abs() - size)),
        (u.abs() + v.abs()) * 0.7071 - size * 0.8,
    ], 1)
    rows = torch.arange(n)
    inside = (0.5 - distances[rows, attributes[:, 2]] / (2.0 / px)).clamp(0, 1)[:, None]

    ground = VALUES[attributes[:, 4]]
    partner = torch.where(ground.mean(1, keepdim=True) > 0.5, ground * 0.55, ground * 0.55 + 0.45)
    direction = uniform(0, 2 * math.pi)
    along = x * direction.cos() + y * direction.sin()
    period, phase = uniform(3.0, 4.0), uniform(0, 1)

    def wave(t: Tensor) -> Tensor:
        return (0.5 + torch.sin(t) * (px / 14)).clamp(0, 1)

    check_x, check_y = wave(period * math.pi * x + phase * 6), wave(period * math.pi * y + phase * 4)
    dot_x, dot_y = ((t * period * 0.75 + phase) % 1 - 0.5 for t in (x.expand(n, -1, -1), y.expand(n, -1, -1)))
    patterns = torch.stack([
        torch.zeros(n, px, px),
        ((along + 1.2) / 2.4).clamp(0, 1),
        check_x * check_y + (1 - check_x) * (1 - check_y),
        wave(period * math.pi * along + phase * 6),
        ((0.28 - (dot_x * dot_x + dot_y * dot_y).sqrt()) * px / 4 + 0.5).clamp(0, 1),
    ], 1)
    mix = patterns[rows, attributes[:, 5]][:, None]
    picture = ground[:, :, None, None] * (1 - mix) + partner[:, :, None, None] * mix
    return (picture * (1 - inside) + VALUES[attributes[:, 1]][:, :, None, None] * inside).clamp(0, 1)


def batch(n: int, px: int, g: Generator) -> tuple[Tensor, list[str]]:
    attributes = sample_attributes(n, g)
    return render(attributes, px, g), [caption(row) for row in attributes.tolist()]
