"""Measured tile choices of attention: a table that `fastformer tune` writes and FASTFORMER_TILES points to.

What the table does not hold comes from `config`. One row chooses for a device, a pass, a class of rules, a dtype class,
a head dimension and a class of lengths:

    {"format": 1, "kernels": "<digest>", "triton": "3.7.1", "rows": [
      {"device": "sm_90", "pass": "forward", "rules": "plain", "dtype": "half", "head_dim": 64, "length": 512,
       "tile": [128, 64, 4, 3], "microseconds": 41.2}]}

- pass: "forward", "dQ" and "dK and dV"; for sequences of at most 128 tokens "short forward" and "short backward"; for
  one new token over a cache "decode", whose length is the cache's and whose rules are "plain".
- rules: "plain" (causal or not), "masked" (a mask over keys alone, dropout) or "rich" (anything else).
- head_dim: the padded one, 64 to 512. length: the longest sequence is at most that, and longer than the next smaller
  class of `LENGTHS` (short passes: of `SHORT_LENGTHS`); null for the longest class.
- tile: queries, keys, warps, stages; short passes take as many keys as there are, and decoding no more rows than query
  heads share a key head. kernels: `digest()` of the sources
  that were timed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
PASSES = ("forward", "dQ", "dK and dV", "short forward", "short backward", "decode")
LENGTHS = (128, 512, 2048, None)
RULES = ("plain", "masked", "rich")
# Classes of the passes that hold all keys in one tile, which is as long as the class.
SHORT_LENGTHS = (32, 64, 128)
WIDTHS = (64, 128, 256, 512)
Key = tuple[str, str, str, str, int, int | None]
Tile = tuple[int, int, int, int]

_FIELDS = {
    "pass": PASSES,
    "rules": RULES,
    "dtype": ("half", "single"),
    "head_dim": WIDTHS,
    "length": (32, 64, *LENGTHS),
}
_forced: dict[Key, Tile] | None = None


@functools.cache
def digest() -> str:
    """What identifies the sources of the attention kernels: measured on others, a table is stale."""
    here = Path(__file__).parent
    found = hashlib.sha256()
    names = ("backward.py", "backward_key.py", "backward_query.py", "decode.py", "forward.py", "score.py", "short.py")
    for name in names:
        found.update((here / name).read_bytes())
    return found.hexdigest()[:16]


def lengths_of(name: str) -> tuple[int | None, ...]:
    """The classes of lengths of a pass."""
    return SHORT_LENGTHS if name.startswith("short") else LENGTHS


def length_class(name: str, length: int) -> int | None:
    """The class of a pass that sequences of up to `length` tokens belong to."""
    return next((limit for limit in lengths_of(name) if limit is None or length <= limit), None)


def chosen(key: Key) -> Tile | None:
    """The measured tile of (device, pass, rules, dtype, head_dim, length class); None if there is none."""
    if _forced is not None:
        return _forced.get(key)
    path = os.environ.get("FASTFORMER_TILES")
    found = _read_once(path).get(key) if path else None
    return None if found is None else found[0]


@contextlib.contextmanager
def forced(rows: dict[Key, Tile]) -> Iterator[None]:
    """Inside, these tiles count and no table is read. Launches prepared before or inside stay as they are."""
    global _forced
    before, _forced = _forced, rows
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _read_once(path: str) -> dict[Key, tuple[Tile, float]]:
    return read(Path(path))


def read(path: Path) -> dict[Key, tuple[Tile, float]]:
    """The rows of a table: {key: (tile, microseconds)}.

    Raises:
        ValueError: it cannot be read, holds what no table holds, or was measured on other kernels; names the file.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the tile table {path} cannot be read: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("rows"), list):
        raise ValueError(f'the tile table {path} must hold "format": {FORMAT} and a list of "rows"')
    if table.get("kernels") != digest():
        raise ValueError(
            f"the tile table {path} was measured on other kernels ({table.get('kernels')}) than these ({digest()}); "
            "run fastformer tune again, or unset FASTFORMER_TILES"
        )
    return dict(_row(path, number, row) for number, row in enumerate(table["rows"]))


def write(path: Path, rows: dict[Key, tuple[Tile, float]], triton: str) -> None:
    """Write a table of {key: (tile, microseconds)}, whole or not at all."""
    names = ("device", *_FIELDS)
    listed = [
        {**dict(zip(names, key, strict=True)), "tile": list(tile), "microseconds": round(time, 2)}
        for key, (tile, time) in rows.items()
    ]
    head = json.dumps({"format": FORMAT, "kernels": digest(), "triton": triton})
    body = ",\n".join(f"  {json.dumps(row)}" for row in listed)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{head[:-1]}, "rows": [\n{body}\n]}}\n', encoding="utf-8")
    os.replace(partial, path)


def _row(path: Path, number: int, row: Any) -> tuple[Key, tuple[Tile, float]]:
    where = f"the tile table {path}, row {number}"
    if not isinstance(row, dict) or not isinstance(row.get("device"), str):
        raise ValueError(f'{where} must be an object with a "device", got {row!r}')
    for name, allowed in _FIELDS.items():
        # 1 == True, and null is a class of lengths: both must be said.
        if name not in row or isinstance(row[name], (bool, list, dict)) or row[name] not in allowed:
            raise ValueError(f'{where}: "{name}" must be one of {allowed}, got {row.get(name)!r}')
    if row["length"] not in lengths_of(row["pass"]):
        raise ValueError(
            f'{where}: "length" of {row["pass"]!r} must be one of {lengths_of(row["pass"])}, got {row["length"]!r}'
        )
    tile = row.get("tile")
    if (
        not isinstance(tile, list)
        or len(tile) != 4
        or any(type(n) is not int for n in tile)
        or any(n < 16 or n > 256 or n & (n - 1) for n in tile[:2])
        or tile[2] not in (1, 2, 4, 8, 16)
        or not 1 <= tile[3] <= 8
    ):
        raise ValueError(
            f'{where}: "tile" must be [queries, keys, warps, stages], powers of two from 16 to 256 twice, a power of '
            f"two up to 16, and 1 to 8, got {tile!r}"
        )
    time = row.get("microseconds")
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not time >= 0:
        raise ValueError(f'{where}: "microseconds" must be a number >= 0, got {time!r}')
    key = (row["device"], row["pass"], row["rules"], row["dtype"], row["head_dim"], row["length"])
    return key, ((tile[0], tile[1], tile[2], tile[3]), float(time))
