"""An export holds what the index holds."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_aimv2.index.reader import Index


@pytest.mark.parametrize("pool", ["mean", "tokens", "map"])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "jsonl"])
def test_exports_hold_what_the_index_holds(folder, embed_command, kind, pool):
    code, _, _ = embed_command("in", "--export", kind, "--pool", pool, "--store", "float32", model="native")
    assert code == 0
    with Index.open("photos.db") as index:
        wanted = list(index.embeddings())
        width, provenance = index.width, index.provenance
    if kind == "jsonl":
        lines = [json.loads(line) for line in Path("photos.jsonl").read_text().splitlines()]
        assert [line["path"] for line in lines] == [one.path for one in wanted]
        for line, one in zip(lines, wanted, strict=True):
            np.testing.assert_array_equal(np.array(line["vector"], np.float32), one.vector)
            assert line["sha256"] == one.sha256.hex()
        return
    if kind == "npz":
        with np.load("photos.npz") as arrays:
            found = dict(arrays)
        paths, about = found["paths"].tolist(), json.loads(str(found["provenance"]))
    else:
        found = load_file("photos.safetensors")
        header = Path("photos.safetensors").read_bytes()
        note = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
        paths, about = json.loads(note["paths"]), json.loads(note["provenance"])
    assert paths == [one.path for one in wanted]
    assert about == provenance
    np.testing.assert_array_equal(found["vectors"], np.concatenate([one.vector.reshape(-1, width) for one in wanted]))
    if pool != "mean":
        assert [tuple(shape) for shape in found["shapes"]] == [one.vector.shape[:-1] for one in wanted]
