"""Drawn pictures for workflows that open one: a heart, a person with a place to dress, and a striped shirt."""
import math
from pathlib import Path

import folder_paths
import torch
from PIL import Image
from torch import Tensor

GROUND, RED, SKIN, HAIR, CLOTH = (0.93, 0.93, 0.93), (0.85, 0.12, 0.2), (0.85, 0.65, 0.5), (0.3, 0.2, 0.15), (0.35, 0.4, 0.5)
STRIPES = ((0.1, 0.3, 0.6), (0.95, 0.95, 0.9))


def offer_pictures() -> None:
    """Write them where Load Image looks."""
    folder = Path(folder_paths.get_input_directory())
    for name, draw in PICTURES.items():
        picture = (draw().clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
        Image.fromarray(picture).save(folder / name)


def places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x to the right and y up, from -1 to 1 over the width."""
    x = ((torch.arange(width) + 0.5) * 2 - width) / width
    y = (height - (torch.arange(height) + 0.5) * 2) / width
    return x[None].expand(height, width), y[:, None].expand(height, width)


def filled(picture: Tensor, inside: Tensor, colour) -> Tensor:
    return torch.where(inside, torch.tensor(colour).view(3, 1, 1), picture)


def ground(height: int, width: int) -> Tensor:
    return torch.tensor(GROUND).view(3, 1, 1).expand(3, height, width)


def heart(side: int = 128, right: float = -0.28, up: float = -0.2, size: float = 0.46, turn: float = 0.35) -> Tensor:
    """[3, side, side]: smaller than a heart of the emoji, to the lower left, and leaning."""
    x, y = places(side, side)
    x, y = (x - right) / size, (y - up) / size
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    return filled(ground(side, side), (x * x + y * y - 1) ** 3 < x * x * y ** 3, RED)


def torso(x: Tensor, y: Tensor) -> Tensor:
    return (y < 0.35) & (y > -0.7) & (x.abs() < 0.42 - 0.1 * y)


def person(height: int = 128, width: int = 96) -> Tensor:
    """[4, height, width]; what is to be dressed is transparent."""
    x, y = places(height, width)
    picture = filled(ground(height, width), torso(x, y), CLOTH)
    picture = filled(picture, (x * x + (y - 0.7) ** 2) < 0.09, SKIN)
    picture = filled(picture, ((x * x + (y - 0.74) ** 2) < 0.1) & (y > 0.8), HAIR)
    picture = filled(picture, (y <= -0.7) & (x.abs() < 0.45) & (x.abs() > 0.06), HAIR)
    return torch.cat([picture, 1 - torso(x, y)[None].float()])


def shirt(height: int = 128, width: int = 96) -> Tensor:
    """[3, height, width]"""
    x, y = places(height, width)
    inside = ((x.abs() < 0.5) & (y.abs() < 0.9)) | ((x.abs() < 0.9) & (y < 0.9) & (y > 0.35 + 0.3 * (x.abs() - 0.5)))
    striped = torch.where((y * 6).floor() % 2 == 0, *(torch.tensor(colour).view(3, 1, 1) for colour in STRIPES))
    return torch.where(inside, striped, torch.ones(3, 1, 1))


PICTURES = {"testbed_heart.png": heart, "testbed_person.png": person, "testbed_shirt.png": shirt}
