"""Single flipped bits, one at a time, over every file of a folder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """Flip one bit of a file, and flip it back."""
    flip(path, bit)
    try:
        yield
    finally:
        flip(path, bit)


def random_flips(folder: Path, count: int, seed: int = 0) -> Iterator[tuple[Path, int]]:
    """Yield files and bits to flip, every file as often as the others."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    chosen = random.Random(seed)
    for number in range(count):
        path = files[number % len(files)]
        yield path, chosen.randrange(8 * path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
