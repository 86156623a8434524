"""Maps are made larger and smaller as the usual operations do it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2.learn.dense import Double, bilinear, halve, linear_weights

pytestmark = pytest.mark.rounding


def normal(*shape):
    return mx.random.normal(shape, key=mx.random.key(5))


def test_doubling_is_a_transposed_convolution():
    layer, x = Double(5, 7), normal(2, 3, 11, 5)
    kernel = layer.proj.weight.reshape(2, 2, 7, 5).transpose(2, 0, 1, 3)  # (out, rows, columns, in)
    wanted = mx.conv_transpose2d(x, kernel, stride=2) + mx.tile(layer.proj.bias.reshape(2, 2, 7), (3, 11, 1))
    np.testing.assert_allclose(np.array(layer(x)), np.array(wanted), atol=1e-5)


def test_halving_takes_the_largest_and_repeats_an_odd_edge():
    x = normal(2, 5, 7, 3)
    got = np.array(halve(x))
    assert got.shape == (2, 3, 4, 3)
    wide = np.pad(np.array(x), ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    for row in range(3):
        for column in range(4):
            part = wide[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(got[:, row, column], part.max(axis=(1, 2)))


def test_interpolation_of_a_plane_is_the_plane():
    row, column = np.mgrid[0:5, 0:7]
    plane = mx.array((3 * row - 2 * column).astype(np.float32))[None, :, :, None]
    got = np.array(bilinear(plane, (15, 35)))[0, :, :, 0]
    rows, columns = (np.arange(15) + 0.5) / 3 - 0.5, (np.arange(35) + 0.5) / 5 - 0.5
    wanted = 3 * rows.clip(0, 4)[:, None] - 2 * columns.clip(0, 6)[None]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_weights_of_interpolation_add_up_to_one():
    for source, target in ((5, 13), (13, 5), (1, 7), (7, 7)):
        np.testing.assert_allclose(linear_weights(source, target).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(linear_weights(7, 7), np.eye(7))
