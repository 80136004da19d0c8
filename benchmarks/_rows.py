"""The rows of a table on disk: a JSON list with a line per row. The file is replaced whole, so it is never half written."""
import json
import os
import time
from pathlib import Path

OFTEN = 3.0     # seconds; a process that is killed loses no more than this
TELLS_APART = ("model", "sampler", "steps", "cfg", "set", "alone", "method", "settings", "prompts", "seeds")


def identity(row: dict) -> str:
    """What a row is about, whoever made it and when."""
    return json.dumps([row[key] for key in TELLS_APART], sort_keys=True)


class Rows:
    """Rows by identity. A new row takes the place of the one before it, and the file follows within seconds."""

    def __init__(self, path: Path):
        self.path, self.rows, self.lines, self.saved = path, {}, {}, 0.0
        for row in json.loads(path.read_text()) if path.is_file() else ():
            self.put(row)

    def put(self, row: dict) -> None:
        self.rows[identity(row)], self.lines[identity(row)] = row, json.dumps(row)

    def add(self, row: dict) -> None:
        self.put(row)
        if time.monotonic() - self.saved > OFTEN:
            self.save()

    def fresh(self, heading: dict) -> bool:
        """Whether the row of this heading is there, and made by what would make it now."""
        row = self.rows.get(identity(heading))
        return row is not None and row["made_by"] == heading["made_by"]

    def keep_only(self, within: dict, wanted: set[str]) -> None:
        """Drop rows that are like `within` in all that it tells and are not wanted: their settings left the table."""
        for name, row in list(self.rows.items()):
            if name not in wanted and all(row[key] == value for key, value in within.items()):
                del self.rows[name], self.lines[name]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("[\n" + ",\n".join(self.lines.values()) + "\n]\n" if self.lines else "[]\n")
        os.replace(part, self.path)
        self.saved = time.monotonic()

    def __iter__(self):
        return iter(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)
