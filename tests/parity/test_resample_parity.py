"""Positions are resampled to another grid as torch does it for timm: bicubic, antialiased, in float32."""

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_aimv2 import load  # noqa: E402
from mlx_aimv2.loading import resample_positions  # noqa: E402
from tests.small_models import FIXED  # noqa: E402

GRIDS = [((16, 16), (24, 24)), ((16, 16), (32, 32)), ((32, 32), (16, 16)), ((3, 5), (11, 13)), ((7, 5), (3, 11))]


def of_torch(table, grid, target, dtype):
    x = torch.tensor(table, dtype=dtype).reshape(1, *grid, -1).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, target, mode="bicubic", antialias=True, align_corners=False)
    return x.permute(0, 2, 3, 1).reshape(-1, table.shape[1]).numpy()


@pytest.mark.parametrize(("grid", "target"), GRIDS, ids=lambda size: "x".join(map(str, size)))
def test_resampling_is_torchs_within_its_own_error(grid, target):
    table = np.random.default_rng(3).normal(scale=0.02, size=(grid[0] * grid[1], 7)).astype(np.float32)
    exact = of_torch(table, grid, target, torch.float64)
    error = np.abs(of_torch(table, grid, target, torch.float32) - exact).max()
    found = np.array(resample_positions(mx.array(table), grid, target))
    assert np.abs(found - exact).max() <= 3 * error
    assert np.abs(found - exact).max() <= 1e-6


@pytest.mark.parametrize("size", [14, 28, 70, 84, 336])
def test_load_resamples_the_positions_of_a_checkpoint_as_torch_does(size):
    own, side = np.array(load(FIXED)[0].pos_embed), load(FIXED)[0].config.image_size // 14
    wanted = of_torch(own, (side, side), (size // 14, size // 14), torch.float32)
    found = np.array(load(FIXED, image_size=size)[0].pos_embed)
    assert np.abs(found - wanted).max() <= 1e-6 * max(1, np.abs(own).max())
