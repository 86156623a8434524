"""Pickled weights are read as torch wrote them, and nothing but weights."""

import json
import pickle
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from mlx_aimv2.loading import read_source  # noqa: E402

FIXED = Path(__file__).parents[1] / "golden" / "reference" / "fixed"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The reference checkpoint without its weights."""
    return Path(shutil.copytree(FIXED, tmp_path / "f", ignore=shutil.ignore_patterns("model.safetensors", "*.npz")))


def weights() -> dict[str, "torch.Tensor"]:
    return load_file(FIXED / "model.safetensors")


def same(folder: Path, dtype: mx.Dtype) -> bool:
    found, wanted = read_source(folder).weights, read_source(FIXED).weights
    return found.keys() == wanted.keys() and all(
        found[name].dtype == dtype and mx.array_equal(found[name], wanted[name].astype(dtype)) for name in wanted
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["state dict", "inside state_dict"])
def test_every_dtype_comes_bit_for_bit(folder, dtype, wrapped):
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights().items()}
    torch.save({"state_dict": state} if wrapped else state, folder / "pytorch_model.bin")
    assert same(folder, getattr(mx, dtype))


def test_shards_with_their_index(folder):
    state, names = weights(), sorted(weights())
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(folder, mx.float32)


class Bomb:
    """Unpickling this without care would run the function."""

    def __reduce__(self):
        return (Path("bomb went off").touch, ())


@pytest.mark.parametrize("content", ["code", "text", "zip", "tensor", "numbers"])
def test_anything_but_weights_is_refused_in_one_line(folder, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = folder / "pytorch_model.bin"
    if content == "code":
        file.write_bytes(pickle.dumps({"w": Bomb()}))
    elif content == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    elif content == "zip":
        file.write_bytes(b"PK\x03\x04" + b"\0" * 99)
    else:
        torch.save(torch.zeros(3) if content == "tensor" else {"w": 1.5}, file)
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin: (torch refuses|contains more than named tensors)"
    ) as caught:
        read_source(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bomb went off").exists()


def test_double_precision_is_refused_by_name(folder):
    torch.save({name: tensor.double() for name, tensor in weights().items()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be float32, float16, bfloat16, got preprocessor.*float64"):
        read_source(folder)
