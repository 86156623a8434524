"""What every test starts from: exact float32 arithmetic and no network; and a CPU of three cores for those that ask."""

import os

# Before the first import of mlx: TensorFloat32 would cost five digits on GPUs that have it.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture
def three_cores(monkeypatch):
    """A function that makes MLX's device an x86 CPU of three cores, and takes what else to set in `x86`."""
    from mlx_aimv2 import x86

    def become(*, blas_threads, **settings):
        settings |= {"on_x86_cpu": lambda: True, "cpu_count": lambda: 3, "blas_threads": lambda: blas_threads}
        for name, value in settings.items():
            monkeypatch.setattr(x86, name, value)
        monkeypatch.delattr(x86._of_thread, "streams", raising=False)

    yield become
    monkeypatch.undo()
    if hasattr(x86._of_thread, "streams"):
        del x86._of_thread.streams


@pytest.fixture
def golden_lit():
    """The small LiT model of the golden values, and its ids."""
    from pathlib import Path

    import mlx.core as mx
    import numpy as np

    from mlx_aimv2 import load

    folder = Path(__file__).parent / "golden" / "reference" / "lit"
    with np.load(folder / "expected.npz") as expected:
        ids = mx.array(expected["input_ids"])
    mx.eval(ids)
    return load(folder)[0], ids
