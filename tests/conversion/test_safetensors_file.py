"""The writer's file holds the same tensors as MLX's own, whatever their shape, order and dtype."""

import json

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlx_aimv2.conversion.folder import write_safetensors


@pytest.fixture
def tensors():
    keys = iter(mx.random.split(mx.random.key(5), 9))
    packed, scales, biases = mx.quantize(mx.random.normal((3, 64), key=next(keys)).astype(mx.float16))
    return {
        "a.odd": mx.random.normal((3,), key=next(keys)).astype(mx.float16),
        "b.turned": mx.random.normal((5, 7), key=next(keys)).T,
        "c.scalar": mx.array(2.5),
        "d.brain": mx.random.normal((11, 2), key=next(keys)).astype(mx.bfloat16),
        "e.packed": packed,
        "f.scales": scales,
        "g.biases": biases,
        "h.bytes": mx.arange(13).astype(mx.uint8),
        "i.view": mx.random.normal((6, 4), key=next(keys))[1:5, ::2],
        "j.ä": mx.zeros((2, 0, 3)),
    }


def test_mlx_and_safetensors_read_what_was_written(tensors, tmp_path):
    wanted, file = dict(tensors), tmp_path / "x.safetensors"
    write_safetensors(file, tensors, metadata={"format": "mlx", "note": "ü"})
    assert not tensors
    found, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "mlx", "note": "ü"}
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name], array), name
    with safe_open(file, framework="numpy") as other:
        assert set(other.keys()) == set(wanted)


def test_no_tensor_lies_at_an_odd_address(tensors, tmp_path):
    sizes = {name: array.dtype.size for name, array in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata={})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    odd = [name for name in sizes if header[name]["data_offsets"][0] % min(sizes[name], 4)]
    assert odd == []


def test_an_empty_file_is_a_file(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {}, metadata={"format": "pt"})
    assert mx.load(str(tmp_path / "x.safetensors")) == {}


def test_mlxs_cache_is_limited_only_meanwhile(tensors, tmp_path):
    before = mx.set_cache_limit(123)
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata={})
    assert mx.set_cache_limit(before) == 123
