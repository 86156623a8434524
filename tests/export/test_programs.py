"""The programs in examples/cpp and examples/swift: the one is built and run, of the other the syntax is parsed."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_aimv2 import bundled, load
from mlx_aimv2.export import export
from mlx_aimv2.images.open import open_image
from mlx_aimv2.learn import predict
from tests.small_training import Workshop

EXAMPLES = Path(__file__).parents[2] / "examples"
EMOJI = bundled.emoji_checkpoint()
CAT, COFFEE = bundled.photographs()[1:3]


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    """Builds the program and gives a function that runs it: words -> (exit code, stdout, stderr)."""
    own = Path(sys.executable).with_name("cmake")
    cmake = str(own) if own.is_file() else shutil.which("cmake")
    if cmake is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("build")
    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in ([cmake, "-S", EXAMPLES / "cpp", "-B", build, *settings], [cmake, "--build", build]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(*words):
        done = subprocess.run([str(build / "encode"), *map(str, words)], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def cosines(text, wanted):
    found = np.array([[float(number) for number in line.split()] for line in text.splitlines()])
    wanted = np.array(wanted.astype(mx.float32)).astype(np.float64)
    assert found.shape == wanted.shape
    return (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)


def raw(place, name, array):
    (place / name).write_bytes(np.ascontiguousarray(array).tobytes())
    return place / name


@pytest.mark.slow
def test_c_plus_plus_gives_the_vectors_of_images_and_texts_and_their_nearest_label(encode, tmp_path):
    model, processor = load(EMOJI, dtype="float32")
    function = export(EMOJI, tmp_path / "encoder.mlxfn", input="uint8", dtype="float32", batch=(1, 2))
    files = [raw(tmp_path, f"{one.stem}.rgb", processor.levels(open_image(one))) for one in (CAT, COFFEE)]
    code, out, err = encode(function, "uint8", "84,84,3", *files)
    assert (code, err) == (0, "")
    assert cosines(out, model.encode_image(processor([CAT, COFFEE]))).min() >= 0.999999

    names = ["cat face", "hot beverage", "rocket"]
    ids = np.full(
        (3, model.config.text_config.max_position_embeddings), model.config.text_config.eos_token_id, np.int32
    )
    own = np.array(processor.tokenize(names))
    ids[:, : own.shape[1]] = own
    text = export(EMOJI, tmp_path / "text.mlxfn", output="text", dtype="float32", batch=(1,))
    vectors = model.encode_text(processor.tokenize(names))
    for row, vector in zip(ids, vectors, strict=True):
        code, out, _ = encode(text, "int32", ids.shape[1], raw(tmp_path, "ids", row))
        assert code == 0 and cosines(out, vector[None]).min() >= 0.999999

    lines = ["\t".join([name, " ".join(map(str, row))]) for name, row in zip(names, vectors.tolist(), strict=True)]
    (tmp_path / "labels.tsv").write_text("\n".join(lines) + "\n")
    code, out, _ = encode(function, "uint8", "84,84,3", *files, "--labels", tmp_path / "labels.tsv")
    cosine = (
        np.array(model.encode_image(processor([CAT, COFFEE]), normalize=True))
        @ np.array(model.encode_text(processor.tokenize(names), normalize=True)).T
    )
    for line, file, row in zip(out.splitlines(), files, cosine, strict=True):
        best = int(row.argmax())
        assert line.split("\t")[:2] == [str(file), names[best]]
        assert abs(float(line.split("\t")[2]) - row[best]) < 1e-5


@pytest.mark.slow
def test_c_plus_plus_names_the_label_of_a_head(encode, tmp_path):
    workshop = Workshop(tmp_path / "learning")
    head = workshop.head("classify", "linear")
    function = export(head, tmp_path / "labels.mlxfn", input="uint8")
    _, processor = load(workshop.encoder)
    image = workshop.data["classify"] / "light" / "0.png"
    [(_, wanted)] = predict(head, [image])
    (tmp_path / "labels.tsv").write_text("dark\ngrey\nlight\n")
    file = raw(tmp_path, "image.rgb", processor.levels(open_image(image)))
    code, out, _ = encode(function, "uint8", "42,42,3", file, "--labels", tmp_path / "labels.tsv")
    best = wanted.best(1)[0]
    assert code == 0 and out.split("\t")[1] == ("dark", "grey", "light")[best]
    assert abs(float(out.split("\t")[2]) - wanted.probabilities[best]) < 2e-6


@pytest.mark.slow
def test_c_plus_plus_ends_wrong_use_in_one_line(encode, tmp_path):
    function = export(EMOJI, tmp_path / "encoder.mlxfn", input="uint8", batch=(1,))
    file = raw(tmp_path, "image.rgb", np.zeros((84, 84, 3), np.uint8))
    wrong = {
        ("uint8", "84,84,3", file, file): "No imported function found .*: the file's .json says how many",
        ("uint8", "56,56,3", file): "image.rgb has 21168 bytes, wanted 9408",
        ("float64", "84,84,3", file): "dtype must be uint8, int32 or float32, got float64",
        ("uint8", "84,84,3", tmp_path / "none.rgb"): "none.rgb cannot be read",
        ("uint8", "84,84,3"): "usage: encode FUNCTION DTYPE SHAPE FILE",
    }
    for words, message in wrong.items():
        code, _, err = encode(function, *words)
        assert code == 2 and re.fullmatch(f"encode: .*{message}.*\n", err), err


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("swift/**/*.swift")), ids=lambda file: file.name)
def test_swift_is_written_in_swift(file):
    if importlib.util.find_spec("tree_sitter_swift") is None:
        pytest.skip("needs tree-sitter-swift, of the extra `test`")
    import tree_sitter
    import tree_sitter_swift

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    source = file.read_bytes()
    assert not parser.parse(source).root_node.has_error
    assert parser.parse(source.replace(b"}", b"", 1) + b"{").root_node.has_error
    assert b"Not compiled" in source
