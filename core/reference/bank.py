"""Where entries live between runs: host memory, by key, the least recently used leaving first.

One bank serves all models, so several prompts, seeds and samplers share what their keys allow. GPU memory is a run's alone
(lend.py): it is reserved with the host before the weights are loaded, and given back when the run ends.
"""
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from torch import Tensor

from .entry import Entry, Key
from .told import MIB


class Bank:
    """`limit`: bytes; `pin` and `unpin` page-lock a tensor and let it go again, and say whether they did."""

    def __init__(self, limit: int = 8192 * MIB, pin: Callable[[Tensor], bool] = lambda tensor: False, unpin: Callable[[Tensor], bool] = lambda tensor: False):
        self.limit, self.pin, self.unpin = limit, pin, unpin
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.hits: dict[str, int] = {}
        self.pinned: dict[str, list[Tensor]] = {}
        self.lock = threading.Lock()
        self.numbers, self.next = weakref.WeakKeyDictionary(), count(1)

    def token(self, model) -> str:
        """A name for a living object, never given to another one, which an address is."""
        with self.lock:
            if model not in self.numbers:
                self.numbers[model] = next(self.next)
            return str(self.numbers[model])

    def base(self, patcher) -> str:
        """Names a model's weights with the patches (LoRA) on them, for as long as this process runs."""
        return f"{self.token(patcher.model)}/{patcher.patches_uuid}"

    def get(self, key: Key) -> Entry | None:
        with self.lock:
            entry = self.entries.get(key.digest)
            if entry is not None:
                self.entries.move_to_end(key.digest)
                self.hits[key.digest] += 1
            return entry

    def peek(self, key: Key) -> Entry | None:
        """Without counting as a use."""
        return self.entries.get(key.digest)

    def put(self, entry: Entry) -> bool:
        """Take a whole entry in, in host memory, or refuse one that is larger than the limit."""
        if entry.bytes > self.limit:
            return False
        kept = at_home(entry)
        with self.lock:
            digest = entry.key.digest
            self.drop(digest)
            while self.entries and self.bytes + kept.bytes > self.limit:
                self.drop(next(iter(self.entries)))
            self.entries[digest], self.hits[digest] = kept, 0
            self.pinned[digest] = [tensor for pair in kept.blocks.values() for tensor in pair if self.pin(tensor)]
        return True

    def forget_reference(self, key: Key) -> None:
        """Every entry of the key's reference, for whatever model, prompt and size it was made."""
        with self.lock:
            for digest in [digest for digest, entry in self.entries.items() if entry.key.reference == key.reference]:
                self.drop(digest)

    def drop(self, digest: str) -> None:
        """With the lock held."""
        for tensor in self.pinned.pop(digest, ()):
            self.unpin(tensor)
        self.entries.pop(digest, None)
        self.hits.pop(digest, None)

    def clear(self) -> int:
        """Bytes that were let go."""
        with self.lock:
            freed = self.bytes
            for digest in list(self.entries):
                self.drop(digest)
            return freed

    def limited(self, limit: int) -> None:
        """Another limit from now on."""
        with self.lock:
            self.limit = limit
            while self.entries and self.bytes > limit:
                self.drop(next(iter(self.entries)))

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)


def at_home(entry: Entry) -> Entry:
    """The entry in host memory, its tensors its own: nobody else's storage is kept alive or written into."""
    def home(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    blocks, scales = ({name: (home(k), home(v)) for name, (k, v) in pairs.items()} for pairs in (entry.blocks, entry.scales))
    return replace(entry, blocks=blocks, scales=scales, ids=None if entry.ids is None else home(entry.ids))
