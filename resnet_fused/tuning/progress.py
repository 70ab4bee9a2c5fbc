"""A progress bar on a terminal."""

from __future__ import annotations

import shutil
import sys


class Progress:
    """A line on the terminal that shows how far the work is, and what is being done."""

    width = 24

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.done = total, 0
        self.shown = shown and sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self.shown:
            bar = "█" * (self.width * self.done // self.total)
            line = f"tuning {bar:░<{self.width}} {self.done}/{self.total} {text}"
            sys.stderr.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()

    def close(self) -> None:
        if self.shown:
            sys.stderr.write(f"\r\033[Ktuned {self.done} of {self.total} problems\n")
