"""Which tile `int8_linear` computes at a time: a table, looked up by GPU and size, so that nothing is tried out at run time.

The first row that fits is taken. Every tile stays in registers, without stack, on all GPUs of the tests, and what it holds in shared
memory fits into the 99 KiB of sm_86, 89 and 120. They are chosen by that and by how many programs they make of a product, 128 at the
least where that is to be had; none has been timed. A tile of 128 x 256 does not fit: 255 registers and a stack on sm_89 and 120.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    m: int          # rows of x
    n: int          # rows of the weight
    k: int          # channels at a time
    warps: int
    stages: int     # tiles on their way from memory


@dataclass(frozen=True)
class Row:
    tile: Tile
    rows: int | None = None         # at most so many rows of x that have one gate; None: any number
    columns: int | None = None      # at most so many rows of the weight
    crowded: bool | None = None     # where what follows the product takes many registers, or where it does not
    architectures: tuple[int, ...] | None = None    # None: all

    def fits(self, architecture: int, rows: int, columns: int, crowded: bool) -> bool:
        return (self.rows is None or rows <= self.rows) and (self.columns is None or columns <= self.columns) and (
            self.crowded in (None, crowded)) and (self.architectures is None or architecture in self.architectures)


USUAL = Tile(128, 128, 128, 8, 3)
TABLE = (
    Row(Tile(16, 128, 128, 4, 3), rows=16),                             # one row for each picture, as of modulation
    Row(Tile(64, 64, 128, 8, 3), crowded=True),
    Row(Tile(64, 128, 128, 8, 3), rows=128),
    Row(Tile(64, 128, 128, 8, 3), rows=512, columns=4096),              # text by itself
    Row(USUAL),
)


def tile(architecture: int, rows: int, columns: int, crowded: bool = False) -> Tile:
    return next(row.tile for row in TABLE if row.fits(architecture, rows, columns, crowded))
