"""What every test starts from: exact float32 arithmetic and no network."""

import os

# Before the first import of mlx: TensorFloat32 would cost five digits on GPUs that have it.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
