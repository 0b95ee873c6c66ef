"""A progress bar for a terminal, lines for anything else."""

import shutil
import sys
import time

WIDTH = 24


def duration(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """`start(what)` before each of `total` steps; `note(text)` for what deserves a line."""

    def __init__(self, total, stream=None):
        self.total, self.stream = total, stream or sys.stderr
        self.live = self.stream.isatty()
        self.done, self.begin = 0, time.perf_counter()

    def _clear(self):
        if self.live:
            self.stream.write("\r\033[K")

    def start(self, what):
        elapsed = time.perf_counter() - self.begin
        self.done += 1
        if self.live:
            filled = WIDTH * (self.done - 1) // self.total
            left = elapsed / (self.done - 1) * (self.total - self.done + 1) if self.done > 1 else 0
            remaining = f", about {duration(left)} left" if self.done > 1 else ""
            bar = "#" * filled + "." * (WIDTH - filled)
            text = f"[{bar}] {self.done}/{self.total} {duration(elapsed)}{remaining}  {what}"
            self._clear()
            self.stream.write(text[: shutil.get_terminal_size().columns - 1])
        else:
            self.stream.write(f"[{self.done}/{self.total} {duration(elapsed)}] {what}\n")
        self.stream.flush()

    def note(self, text):
        self._clear()
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def close(self):
        self._clear()
        self.stream.write(f"{self.done} done in {duration(time.perf_counter() - self.begin)}\n")
        self.stream.flush()
