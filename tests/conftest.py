"""What every test starts from: exact float32 arithmetic and no network; and a CPU of three cores for those that ask."""

import os

# Before the first import of mlx: TensorFloat32 would cost five digits on GPUs that have it.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture
def three_cores(monkeypatch):
    """A function that makes MLX's device an x86 CPU of three cores, and takes what else to set in `cores`."""
    from mlx_aimv2 import cores

    def become(*, blas_threads, **settings):
        settings |= {"on_x86_cpu": lambda: True, "count": lambda: 3, "blas_threads": lambda: blas_threads}
        for name, value in settings.items():
            monkeypatch.setattr(cores, name, value)
        monkeypatch.delattr(cores._of_thread, "streams", raising=False)

    yield become
    monkeypatch.undo()
    if hasattr(cores._of_thread, "streams"):
        del cores._of_thread.streams
