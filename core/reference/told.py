"""Numbers as a line under a node has them: what is little does not read as nothing."""
MIB = 1 << 20


def mib(size: float) -> str:
    """Bytes in MiB, or in KiB where these would be rounded to none."""
    if 0 < size < MIB / 10:
        return f"{size / 1024:.1f} KiB"
    return f"{size / MIB:.1f} MiB" if size else "0 MiB"


def share(part: float) -> str:
    return "under 0.01%" if 0 < part < 1e-4 else f"{part:.2%}"


def many(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
