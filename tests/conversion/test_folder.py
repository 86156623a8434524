"""The weights of a folder are cut into shards that stay within their size."""

import json

import mlx.core as mx

from mlx_aimv2.conversion.folder import save_weights


def test_a_shard_is_closed_before_it_passes_its_size(tmp_path):
    weights = {name: mx.zeros(size) for name, size in {"a": 10, "b": 11, "c": 12, "d": 60, "e": 1}.items()}
    size = save_weights(tmp_path, weights.items(), shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [int(index["weight_map"][name].split("-")[1]) for name in weights]
    assert shards == [1, 1, 2, 3, 4]  # one tensor alone may be larger
    assert size == index["metadata"]["total_size"] == 4 * 94
