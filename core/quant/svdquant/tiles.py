"""nunchaku's tensors out of the order in which its kernels load them, into rows and columns.

The facts that this rests on, from the packer of deepcompressor (backend/nunchaku, backend/tinychat; Apache-2.0). A tensor core's
32 lanes are 8 along the rows and 4 along the columns; every index below counts from the slowest to the fastest in memory.

    weights   tiles of 128 rows x 64 columns, row tiles first; in a tile [8 row packs, 8 row lanes, 4 column lanes, 2 row halves,
              2 column halves] of words of 8 codes, 4 bits each, the lowest first:
              row = 16 pack + 8 half + lane,  column = 32 half + 8 lane + code
    scales    of 64 columns (int4): [row tiles, column groups] of 128 in the order [8, 4, 2, 2]:  row = 16 a + 2 b + 8 c + d
    vectors   bias, smoothing, scale of a row: the same, without groups
    micro     scales of 16 columns (nvfp4): [row tiles, K / 64, 8, 4, 4, 4]:  row = 32 c + 8 b + a,  group = 4 (K / 64) + d
    branches  16 x 16 tiles, [8 lanes, 4 lanes, 2, 2, 2]:  first = 8 c + a,  second = 8 d + 2 b + e, where (first, second) is
              (rank, input) of the down projection and (output, rank) of the up projection; tiles along inputs or outputs first
    AWQ       four rows beside each other: [N / 4, K / 64, 4] of 64 codes, in words of 16 bits; a word has the columns j, 8 + j,
              16 + j and 24 + j of 32

Sizes are checked by whoever calls. Whether published files are so could not be tried where this was written; tests write files
from the same description, with code of their own.
"""
import torch
from torch import Tensor

TILE = 128      # rows of a tile
GROUP = 64      # columns of a tile, and of an int4 scale
MICRO = 16      # columns of an nvfp4 scale
RANKS = 16      # ranks come in tiles of so many
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
E2M1_PAIRS = torch.stack([E2M1.repeat(16), E2M1.repeat_interleave(16)], 1)


def weights(packed: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Row tiles `start` to `stop` of int8 [N, K / 2] as uint8 [rows, K / 2]: column 2 j in the low bits of byte j."""
    n, half = packed.shape
    tiles, columns = n // TILE, half * 2
    bytes_ = packed.reshape(tiles, -1)[start:stop]
    if bytes_.storage_offset() % 4:
        bytes_ = bytes_.clone()
    words = bytes_.view(torch.int32).reshape(-1, columns // GROUP, 8, 8, 4, 2, 2)
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(-1, columns // 8).view(torch.uint8)


def codes(natural: Tensor) -> Tensor:
    """The codes of uint8 [rows, K / 2], as uint8 [rows, K] of 0 to 15."""
    return torch.stack([natural & 15, natural >> 4], -1).flatten(-2)


def int4(natural: Tensor) -> Tensor:
    """The same as numbers from -8 to 7, fp32."""
    return ((codes(natural) ^ 8).view(torch.int8) - 8).float()


def e2m1(natural: Tensor) -> Tensor:
    """The same as numbers of a sign, two exponent bits and one of mantissa, fp32. Two at once, from a table of all bytes."""
    return E2M1_PAIRS.to(natural.device).index_select(0, natural.reshape(-1).int()).view(natural.shape[0], -1)


def scales(stored: Tensor) -> Tensor:
    """[K / 64, N], or a vector [N], with its columns in order."""
    groups, n = (1, stored.shape[0]) if stored.ndim == 1 else stored.shape
    return stored.reshape(n // TILE, groups, 8, 4, 2, 2).permute(1, 0, 2, 4, 3, 5).reshape(stored.shape)


def micro_scales(stored: Tensor) -> Tensor:
    """float8 [K / 16, N] as [N, K / 16]."""
    groups, n = stored.shape
    ordered = stored.view(torch.uint8).reshape(n // TILE, groups // 4, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5)
    return ordered.reshape(n, groups).view(stored.dtype)


def down(stored: Tensor) -> Tensor:
    """The branch's first half, [K, r]."""
    k, rank = stored.shape
    return stored.reshape(k // 16, rank // 16, 8, 4, 2, 2, 2).permute(0, 5, 3, 6, 1, 4, 2).reshape(k, rank)


def up(stored: Tensor) -> Tensor:
    """The branch's second half, [N, r]."""
    n, rank = stored.shape
    return stored.reshape(n // 16, rank // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)


def awq_rows(packed: Tensor, rows: Tensor) -> Tensor:
    """Some rows of int32 [N / 4, K / 2], as uint8 [len(rows), K / 2]: column 2 j in the low bits of byte j."""
    columns = packed.shape[1] * 2
    fours = packed.contiguous().view(torch.int16).view(-1, columns // GROUP, 4, GROUP // 4)
    words = fours[rows // 4, :, rows % 4].view(-1, columns // 32, 4, 2)
    even, odd = words[..., 0], words[..., 1]
    pairs = [(even >> shift & 15 | (odd >> shift & 15) << 4).to(torch.uint8) for shift in (0, 4, 8, 12)]
    return torch.stack(pairs, 2).view(-1, columns // 2)
