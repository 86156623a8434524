"""Measures a search over a million images beside the matrix product alone over the same memory.

python -m benchmarks.search [--images 1000000] [--width 768] [--file PATH]

Makes an index of random float16 vectors, opens it in a fresh process, and alternates `Index.search`, by one vector and
by three that are combined, with the product `vectors @ query` over the same memory. Prints the median of each.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_aimv2.index.reader import Embedding, Index
from mlx_aimv2.index.writer import IndexWriter

ROUNDS = 15
AT_ONCE = 8192


def make(file: Path, images: int, width: int) -> None:
    """Fills an index with random vectors by the same calls as `mlx-aimv2 embed`."""
    random = np.random.default_rng(0)
    with IndexWriter.create(file, provenance={}, width=width, dtype="float16") as index:
        for start in range(0, images, AT_ONCE):
            vectors = random.standard_normal((min(AT_ONCE, images - start), width), np.float32)
            names = (f"/Users/someone/Images/2024/IMG_{start + i:07d}.jpg" for i in range(len(vectors)))
            index.add(Embedding(name, 1, 1, bytes(32), row) for name, row in zip(names, vectors, strict=True))


def milliseconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def measure(file: Path) -> None:
    """Prints the time of opening, of a search and of the matrix product."""
    start = time.perf_counter()
    index = Index.open(file)
    query, *others = np.random.default_rng(1).standard_normal((3, index.width)).astype(np.float32)
    parts = [(1.0, query), (2.0, others[0]), (-0.5, others[1])]
    vectors = index.read_vectors()
    opened = time.perf_counter() - start
    rows = vectors.rows
    if isinstance(rows, np.ndarray):
        where = f"NumPy {np.__version__}, {rows.dtype}, {rows.nbytes / 1e9:.2f} GB"

        def multiply() -> object:
            return rows @ query
    else:
        where = f"MLX {mx.__version__} on {mx.default_device()}, {rows[0].dtype}"
        wanted = mx.array(query).astype(rows[0].dtype)

        def multiply() -> object:
            return mx.eval([part @ wanted for part in rows])

    searches, combined, products = [], [], []
    for _ in range(ROUNDS):
        products.append(milliseconds(multiply))
        searches.append(milliseconds(lambda: index.search(query, 12)))
        combined.append(milliseconds(lambda: index.search(parts, 12)))
    search, product = statistics.median(searches), statistics.median(products)
    print(f"{len(vectors)} x {index.width} {index.dtype} vectors, {file.stat().st_size / 1e9:.2f} GB on disk")
    print(f"{platform.machine()}, Python {platform.python_version()}; in memory: {where}")
    print(f"open and read all vectors   {opened:8.2f} s")
    print(f"matrix product alone        {product:8.1f} ms (fastest {min(products):.1f})")
    print(f"search for 12               {search:8.1f} ms (fastest {min(searches):.1f})")
    print(f"by three vectors combined   {statistics.median(combined):8.1f} ms (fastest {min(combined):.1f})")
    print(f"search / matrix product     {search / product:8.2f}")


def main() -> None:
    """Makes the file if it is missing, then measures in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--file", type=Path, help="keep the index here; used again when it exists")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "million.db"
        if not file.exists():
            make(file, arguments.images, arguments.width)
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from pathlib import Path; from benchmarks.search import measure; measure(Path({str(file)!r}))",
            ],
            check=True,
        )


if __name__ == "__main__":
    main()
