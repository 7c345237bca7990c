"""A progress bar on stderr: one line, redrawn at most ten times a second, silent where stderr is no terminal."""

from __future__ import annotations

import sys
import time


class Bar:
    def __init__(self, name: str, total: int, unit: str = "") -> None:
        self.name, self.total, self.unit = name, total, unit
        self.start = time.monotonic()
        self.drawn = 0.0
        self.visible = sys.stderr.isatty()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if not self.visible or (now - self.drawn < 0.1 and done < self.total):
            return
        self.drawn = now
        share = min(1.0, done / self.total) if self.total else 1.0
        rate = done / max(now - self.start, 1e-9)
        bar = "#" * round(30 * share)
        print(f"\r{self.name} [{bar:<30}] {share:4.0%} {rate:,.0f}{self.unit}/s ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.visible:
            print(file=sys.stderr)
