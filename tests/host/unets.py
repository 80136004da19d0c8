"""What the tests of UNets share: their levels in the settings that matter, and what a skip is to run."""
from harness import network

from pack.core.stepcache.levels import LEVELS
from testbed import tiny

PICTURES = ("sd15_like", "sdxl_like")
NAMES = [name for name in tiny.OF_FAMILY["unet"] if name != "sd15"]     # which has a full-size first level
UNET_LEVELS = [name for name, level in LEVELS.items() if getattr(level, "serves", None) == "unet"]
ANY_LEVELS = [name for name, level in LEVELS.items() if hasattr(level, "seam") and level.serves is None]
PLAIN = {"guided output": {"look_back": False}}     # a computed step repeats nothing when it makes up for the one before
BLOCKS = 9      # on either side
BRANCHES = (0, 1, 2, 4, 7, 11)     # the last is more than there are
VIDEO = {"svd_like": {"batch": 3}}
CASES = [("unet depth", {"branch": branch}) for branch in BRANCHES] + [("unet encoder", {})]
IDS = [f"{level} {knobs}" for level, knobs in CASES]
FEW = [CASES[0], CASES[3], CASES[-1]]


def blocks(patcher) -> list:
    """Input blocks, the middle one, output blocks."""
    net = network(patcher)
    return [*net.input_blocks, net.middle_block, *net.output_blocks]


def kept(level: str, knobs: dict) -> set[int]:
    """Places in `blocks` that a skip runs."""
    if level == "unet encoder":
        return set(range(BLOCKS + 1, 2 * BLOCKS + 1))
    shallow = min(knobs["branch"], BLOCKS - 2) + 1
    return set(range(shallow)) | set(range(2 * BLOCKS + 1 - shallow, 2 * BLOCKS + 1))
