"""What the modulations of one model gave in a run, by what they were given: to the bit, shape and type included.

    table[bits of the vector, name of the modulation] = modulation(vector)

A batch of two is not bitwise two of one on every device, so each layout has rows of its own. Before the first call of a
layout the model is heard: it is called for every sigma that is still to come, up to the first modulation, whose vector is
noted. When a modulation is asked for the first time its weights are lent to it, and it is computed for all of them at once.
"""
import dataclasses
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

Key = tuple[torch.dtype, tuple[int, ...], bytes]


class Heard(Exception):
    """Ends a call of the model at its first modulation."""

    def __init__(self, vector: Tensor):
        self.vector = vector


@dataclass
class Ahead:
    """The vectors that a layout's calls will bring, in the order of the schedule."""

    vectors: list[Tensor] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    sigmas: set[float] = field(default_factory=set)
    whole: bool = True      # whether there are no more
    views: dict[tuple, Key] = field(default_factory=dict)       # keys of the vectors and of views of them
    rows: set[Key] = field(default_factory=set)                 # that were computed ahead


class Table:
    """limit: bytes that the rows may take; passed: called with the number of modulations that have been computed, and the seconds it took."""

    def __init__(self, limit: int, passed: Callable[[int, float], None] = lambda done, seconds: None):
        self.limit, self.passed = limit, passed
        self.rows: dict[Key, dict[str, object]] = {}
        self.ahead: dict[tuple, Ahead] = {}
        self.seen: dict[tuple, tuple[Tensor, Key]] = {}     # of this call, so that the GPU is waited for once and not per modulation
        self.passing: set[Key] = set()      # rows that no other call will ask for
        self.listening, self.trusting = False, True
        self.now: Ahead | None = None
        self.vector: Tensor | None = None   # of this call, as the model made it,
        self.place = 0                      # and which of those ahead it is
        self.bytes = self.most = self.found = self.done = self.streamed = 0
        self.seconds = 0.0
        self.streams = False        # whether this call had to compute for itself alone

    def hear(self, layout: tuple, sigmas: list[float], call: Callable[[float], object], bytes_of: Callable[[Tensor], int]) -> None:
        """Note the vectors of the layout's calls at the sigmas, as many as leave room for those of another layout."""
        old = self.ahead.pop(layout, None)
        self.drop(old.rows if old else ())
        ahead, fit = self.ahead.setdefault(layout, Ahead()), len(sigmas)
        for sigma in sigmas:
            if len(ahead.vectors) == fit:
                ahead.whole = False
                break
            vector = self.first_vector(partial(call, sigma))
            if vector is None:
                break
            if not ahead.vectors and (rows := (self.limit - self.bytes) // bytes_of(vector)) < fit:
                fit = max(rows // 2, min(rows, 2), 1)
            ahead.vectors.append(vector)
            ahead.keys.append(view_key(ahead.views, vector))
            ahead.sigmas.add(sigma)

    def first_vector(self, call: Callable[[], object]) -> Tensor | None:
        self.listening = True
        try:
            call()
        except Heard as heard:
            return heard.vector.detach()
        finally:
            self.listening = False
        return None

    @contextmanager
    def call(self, layout: tuple, trusting: bool):
        """A model call. trusting: nobody but the model itself gets hold of its vector, so the same memory has the same bits."""
        self.now, self.trusting, self.streams = self.ahead.get(layout), trusting, False
        try:
            yield
        finally:
            self.streamed += self.streams
            self.now = self.vector = None
            self.drop(self.passing)
            self.passing.clear()
            self.seen.clear()

    def ask(self, stand_in, vector: Tensor):
        """What the modulation that `stand_in` stands for makes of a vector: found, or computed while its weights are lent to it."""
        if self.listening:
            raise Heard(vector)
        key = self.key(vector)
        rows = self.rows.get(key, {})
        if stand_in.name in rows:
            self.found += 1
            return rows[stand_in.name]
        begun = time.perf_counter()
        following = self.following(vector, key)
        self.streams |= following is None or not (following or self.now.whole)
        (self.passing if following is None else self.now.rows).add(key)
        with stand_in.lent(vector):
            result = stand_in.held(vector)
            self.keep(key, stand_in.name, result)
            for other in following or ():
                coming = view_key(self.now.views, other)
                self.keep(coming, stand_in.name, stand_in.held(other))
                self.now.rows.add(coming)
        self.done += 1
        self.seconds += time.perf_counter() - begun
        self.passed(self.done, self.seconds)
        return result

    def key(self, vector: Tensor) -> Key:
        place = place_of(vector)
        if not self.trusting or place not in self.seen:
            self.seen[place] = (vector, key_of(vector))     # the tensor is kept, so nothing else comes to lie there
        return self.seen[place][1]

    def following(self, vector: Tensor, key: Key) -> list[Tensor] | None:
        """What this modulation will be given later: the same view of the vectors heard as `vector` is of this call's; None if it is no view of it."""
        if self.now is None:
            return None
        if self.vector is None and key in self.now.keys:
            self.vector, self.place = vector, self.now.keys.index(key)
        mine = self.vector
        if mine is None or vector.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr() or vector.dtype != mine.dtype:
            return None
        shift = vector.storage_offset() - mine.storage_offset()
        later = self.now.vectors[self.place + 1:]
        return [other.as_strided(vector.shape, vector.stride(), other.storage_offset() + shift)
                for other in later if other.shape == mine.shape and other.stride() == mine.stride()]

    def keep(self, key: Key, name: str, result) -> None:
        size = bytes_in(result)
        if self.bytes + size <= self.limit and name not in self.rows.get(key, {}):
            self.rows.setdefault(key, {})[name] = result
            self.bytes += size
            self.most = max(self.most, self.bytes)

    def drop(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.bytes -= sum(map(bytes_in, self.rows.pop(key, {}).values()))

    def close(self) -> None:
        self.rows, self.ahead, self.bytes = {}, {}, 0


def place_of(vector: Tensor) -> tuple:
    return vector.data_ptr(), tuple(vector.shape), vector.stride(), vector.dtype


def view_key(views: dict[tuple, Key], vector: Tensor) -> Key:
    place = place_of(vector)
    if place not in views:
        views[place] = key_of(vector)
    return views[place]


def key_of(vector: Tensor) -> Key:
    return vector.dtype, tuple(vector.shape), vector.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()


def bytes_in(result) -> int:
    """Memory that a modulation's result holds: a tensor, or tensors in tuples and records, that may share it."""
    storages: dict[int, int] = {}

    def walk(value) -> None:
        if torch.is_tensor(value):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (tuple, list)):
            for part in value:
                walk(part)
        elif dataclasses.is_dataclass(value):
            for part in vars(value).values():
                walk(part)

    walk(result)
    return sum(storages.values())
