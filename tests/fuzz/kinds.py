"""The kinds of input that are broken: for each how one is made from a dice, and what is then done with it.

A kind is a function `(dice, folder of whole inputs, empty folder) -> what to call`; the file that was broken lies in
the empty folder, so that it can be kept.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import learning
from tests.fuzz.images import broken_image, make_images
from tests.fuzz.mutate import broken_bytes, broken_tensors, broken_text

Call = Callable[[], object]
Kind = Callable[[random.Random, Path, Path], Call]

CHECKPOINTS = ("lit", "fixed", "native", "mlx", "mlx-lit")

SIDE_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors.index.json",
)

STATEMENTS = (
    "CREATE VIEW v AS SELECT * FROM images",
    "DROP TABLE images; CREATE VIEW images AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
    "SELECT n AS id, x'2f61' AS path, 1 AS size, 1 AS mtime_ns, x'00' AS sha256, 1.0 AS length, NULL AS rows, "
    "NULL AS columns, 1 AS block FROM r",
    "CREATE TRIGGER t BEFORE INSERT ON images BEGIN DELETE FROM images; END",
    "CREATE TRIGGER t AFTER DELETE ON images BEGIN INSERT INTO images (path, size, mtime_ns, sha256, block) "
    "VALUES (randomblob(8), 1, 1, x'00', 1); END",
    "ALTER TABLE images ADD COLUMN g INTEGER GENERATED ALWAYS AS (id * 2)",
    "DROP TABLE about",
    "DROP TABLE blocks",
    "DELETE FROM about WHERE name = (SELECT name FROM about ORDER BY random() LIMIT 1)",
    "INSERT INTO about VALUES ('more', 'x')",
    "DELETE FROM blocks",
    "DELETE FROM images WHERE id = 2",
    "PRAGMA user_version = 99",
    "PRAGMA application_id = 7",
    "PRAGMA journal_mode = WAL",
    "PRAGMA encoding = 'UTF-16'; VACUUM",
)

MODULES = (
    "mlx_aimv2",
    "mlx_aimv2.convert",
    "mlx_aimv2.index.export",
    "mlx_aimv2.learn.fit_head",
    "mlx_aimv2.learn.head_folder",
    "mlx_aimv2.learn.classify",
    "mlx_aimv2.learn.segment",
    "mlx_aimv2.learn.detect",
    "mlx_aimv2.pretrain.lit_tuning",
    "mlx_aimv2.cli",
    "tokenizers",
    "huggingface_hub",
)
"""What is imported before the first input is tried."""

ANSWERS: tuple[tuple[int, str, bytes], ...] = (
    (200, "text/html", b"<html><body>Sign in to the network</body></html>"),
    (200, "application/json", b"[]"),
    (200, "application/json", b"null"),
    (200, "application/json", b'"x"'),
    (200, "application/json", b"{}"),
    (200, "application/json", b'{"sha": 5, "siblings": 7}'),
    (200, "application/json", b'{"sha": "../../x", "siblings": [{"rfilename": "../../x"}]}'),
    (200, "application/json", b'{"sha": null, "siblings": [{}]}'),
    (200, "application/json", b"[" * 50_000),
    (204, "application/json", b""),
    (301, "text/plain", b""),
    (400, "application/json", b'{"error": "bad\\nrequest"}'),
    (401, "application/json", b'{"error": "Invalid username or password."}'),
    (403, "application/json", b'{"error": "Forbidden"}'),
    (404, "text/html", b"<html>not found</html>"),
    (410, "text/plain", b"gone"),
    (416, "text/plain", b""),
    (418, "text/plain", b"teapot"),
    (451, "text/plain", b"for legal reasons"),
)
"""What a proxy, a captive portal or another server may answer in place of the Hub."""


def make_whole_inputs(folder: Path) -> None:
    """The whole inputs that every kind breaks: checkpoints in several layouts, and indexes of all axes."""
    import numpy as np

    from mlx_aimv2.convert import convert
    from mlx_aimv2.index.reader import Embedding
    from mlx_aimv2.index.writer import IndexWriter
    from tests import small_models

    make_images(folder / "images")
    small_models.pair_with_words(folder / "lit")
    shutil.copytree(small_models.FIXED, folder / "fixed")
    shutil.copytree(small_models.NATIVE, folder / "native")
    convert(folder / "fixed", folder / "mlx", quantize=True, q_bits=8, q_group_size=32, verify=False)
    convert(folder / "lit", folder / "mlx-lit", verify=False)
    for name, text in (("vocab.json", "{}"), ("merges.txt", ""), ("special_tokens_map.json", "{}")):
        if not (folder / "lit" / name).exists():
            shutil.copy(_other_tokenizer(name), folder / "lit" / name) if _other_tokenizer(name) else (
                folder / "lit" / name
            ).write_text(text)
    learning.make_whole(folder / "learning")
    made = {"checkpoint": "x", "commit": None, "dtype": "float32", "pool": "mean", "layer": None, "norm": False}
    made |= {"max_patches": None, "weights": {"digest": "00", "sample": [1.0]}, "preprocessing": {}, "width": 7}
    for axes, shape in ((1, (7,)), (2, (3, 7)), (3, (2, 5, 7))):
        dice = np.random.default_rng(axes)
        path = folder / f"axes{axes}.db"
        with IndexWriter.create(path, provenance=made, width=7, axes=axes, dtype="float16") as index:
            vectors = dice.normal(size=(5, *shape)).astype(np.float32)
            index.add(Embedding(f"/{i}.jpg", 5, 6, bytes(32), vector) for i, vector in enumerate(vectors))


def safetensors(dice: random.Random, whole: Path, place: Path) -> Call:
    """A weight file whose header says something else, or whose bytes are broken."""
    folder = _copied(whole / dice.choice(CHECKPOINTS), place, without="model.safetensors")
    data = broken_tensors((folder.source / "model.safetensors").read_bytes(), dice)
    (place / "model.safetensors").write_bytes(data)
    return lambda: _use(place)


def config(dice: random.Random, whole: Path, place: Path) -> Call:
    """A checkpoint whose config.json says something else, in each of the formats that are known."""
    folder = _copied(whole / dice.choice(CHECKPOINTS), place, without="config.json")
    content = json.loads((folder.source / "config.json").read_text())
    what = dice.random()
    if what < 0.15 and "vision_config" not in content:
        content = {"visual_tokenizer_config": {"backbone_config": content}, "model_type": "ovis"}
    elif what < 0.3 and "vision_config" not in content:
        content = {
            "architecture": "aimv2_large_patch14_224",
            "pretrained_cfg": {"input_size": [3, 42, 42], "mean": [0.5] * 3, "std": [0.5] * 3},
            "model_args": {"embed_dim": content.get("hidden_size"), "depth": content.get("num_hidden_layers")},
        }
    elif what < 0.4:
        content["quantization"] = {"group_size": 32, "bits": 8}
    (place / "config.json").write_bytes(broken_text(content, dice))
    return lambda: _use(place)


def side_files(dice: random.Random, whole: Path, place: Path) -> Call:
    """A checkpoint one of whose smaller files is broken: preprocessing, tokenizer, list of shards, card."""
    name = dice.choice(SIDE_FILES)
    base = whole / dice.choice(("mlx", "mlx-lit") if "index" in name else ("lit", "mlx-lit", "fixed", "native"))
    source = next((one for one in (base / name, whole / "lit" / name, whole / "mlx" / name) if one.is_file()), None)
    _copied(base, place, without=name)
    if name in ("vocab.json", "merges.txt"):
        (place / "tokenizer.json").unlink(missing_ok=True)
    data = source.read_bytes() if source is not None else b"{}"
    data = broken_bytes(data, dice) if name == "merges.txt" else broken_text(json.loads(data), dice)
    (place / name).write_bytes(data)
    return lambda: _use(place)


def card(dice: random.Random, whole: Path, place: Path) -> Call:
    """A conversion of a checkpoint whose README.md has broken or hostile YAML at its head."""
    from mlx_aimv2.convert import convert

    source = place / "source"
    source.mkdir()
    _copied(whole / "lit", source)
    heads = (
        "license: apple-amlr\nlicense_name: apple\nlicense_link: LICENSE\nbase_model: apple/x\n",
        "license: [a, b]\nlicense_name: {x: y}\nlicense_link: 5\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nlicense: *b\n",
        "license: !!python/object/apply:os.system [echo]\n",
        "license: |\n  two\n  lines\nlicense_name: '\x1b]0;x\x07'\n",
        f"license: {'x' * 100_000}\n",
    )
    text = f"---\n{dice.choice(heads)}---\n# card\n".encode()
    (source / "README.md").write_bytes(broken_bytes(text, dice) if dice.random() < 0.8 else text)
    return lambda: convert(source, place / "mlx", verify=False)


def images(dice: random.Random, whole: Path, place: Path) -> Call:
    """A broken image in any format."""
    file = place / "image"
    file.write_bytes(broken_image(dice, whole / "images"))
    return lambda: processor_of(whole / dice.choice(("fixed", "native")))(str(file), max_patches=64)


def indexes(dice: random.Random, whole: Path, place: Path) -> Call:
    """An index whose file is broken, or whose tables say something else."""
    file = place / "photos.db"
    shutil.copy(whole / f"axes{dice.choice((1, 1, 2, 3))}.db", file)
    what = dice.random()
    if what < 0.5:
        file.write_bytes(_broken_database(file.read_bytes(), dice))
    elif what < 0.75:
        _run(file, dice.choice(STATEMENTS))
    else:
        table, column = dice.choice(
            (
                *((("about", "value"),) * 3),
                *(("images", name) for name in ("path", "size", "mtime_ns", "sha256", "length", "rows", "block", "id")),
                ("blocks", "images"),
                ("blocks", "vectors"),
                ("blocks", "id"),
            )
        )
        value = dice.choice((b"", b"\xff" * 9, "x", "-1", 0, -1, 1 << 40, 2.5, float("inf"), "[" * 50_000, b"a" * 24))
        which = dice.choice(("", " WHERE rowid = 1", " WHERE rowid % 2 = 0"))
        _run(file, f"UPDATE OR IGNORE {table} SET {column} = ?{which}", value)
    return lambda: _use_index(file)


def hub(dice: random.Random, whole: Path, place: Path) -> Call:
    """A download from a Hub some of whose answers are another server's."""
    from tests.fuzz.hub import downloads_from_a_broken_hub

    return downloads_from_a_broken_hub(dice, whole / "lit", place)


def pickles(dice: random.Random, whole: Path, place: Path) -> Call:
    """A broken file of PyTorch's."""
    import io
    import zipfile

    import torch

    from mlx_aimv2.checkpoint.read import read_tensors

    weights = {"patchifier.proj.weight": torch.ones(3, 5), "norm.weight": torch.ones(7, dtype=torch.bfloat16)}
    state: Any = dice.choice(({"state_dict": weights}, weights, {**weights, "step": 5}))
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=dice.random() < 0.8)
    data = stream.getvalue()
    if dice.random() < 0.6 and zipfile.is_zipfile(io.BytesIO(data)):
        old, new = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
        with zipfile.ZipFile(new, "w") as archive:
            for name in old.namelist():
                content = old.read(name)
                archive.writestr(name, broken_bytes(content, dice) if name.endswith("data.pkl") else content)
        data = new.getvalue()
    else:
        data = broken_bytes(data, dice)
    file = place / "pytorch_model.bin"
    file.write_bytes(data)
    return lambda: read_tensors([file])


KINDS: dict[str, tuple[Kind, int]] = {
    "images": (images, 4000),
    "jpegs": (learning.jpegs, 1500),
    "safetensors": (safetensors, 1500),
    "config": (config, 1500),
    "side_files": (side_files, 1200),
    "indexes": (indexes, 1200),
    "card": (card, 100),
    "hub": (hub, 400),
    "pickles": (pickles, 200),
    "heads": (learning.heads, 1800),
    "states": (learning.states, 500),
    "coco": (learning.coco, 1300),
    "labels": (learning.labels, 1300),
    "formats": (learning.formats, 1200),
    "masks": (learning.masks, 600),
    "shards": (learning.shards, 1000),
    "captions": (learning.captions, 400),
    "arguments": (learning.arguments, 300),
}
"""Name -> the kind, and how many of 20,000 inputs are of it."""


def available() -> list[str]:
    """The kinds that can be made here: pickles need torch."""
    return [name for name in KINDS if name != "pickles" or importlib.util.find_spec("torch") is not None]


class _Copy:
    """Where a checkpoint was copied from."""

    def __init__(self, source: Path) -> None:
        self.source = source


def _copied(source: Path, place: Path, *, without: str = "") -> _Copy:
    """A checkpoint whose files are links to the whole ones, which are not changed."""
    for file in source.iterdir():
        if file.name not in (without, "expected.npz"):
            os.link(file, place / file.name)
    return _Copy(source)


def _use(folder: Path) -> None:
    """Everything that is done with a checkpoint: loaded, and run on an image and a text of two words."""
    import mlx.core as mx

    from mlx_aimv2 import load

    model, processor = load(folder)
    pixels = processor(_ARRAY, max_patches=64)
    if pixels.size < 1 << 20:
        mx.eval(model.encode_image(pixels))
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        ids = processor.tokenize(["red dog", "a"])
        if hasattr(model, "text_model"):
            mx.eval(model.encode_text(ids))


def processor_of(folder: Path) -> Any:
    from mlx_aimv2 import load

    if folder not in _processors:
        _processors[folder] = load(folder)[1]
    return _processors[folder]


def _use_index(file: Path) -> None:
    """Everything that is done with an index: read, searched, exported, written to."""
    import numpy as np

    from mlx_aimv2.embed.encode import made_by
    from mlx_aimv2.index.export import export
    from mlx_aimv2.index.reader import Embedding, Index
    from mlx_aimv2.index.writer import IndexWriter

    with Index.open(file) as index:
        errors: list[Exception] = []
        paths: list[str] = []
        for step in (
            lambda: paths.extend(index.paths()),
            lambda: [index.stamp(path) for path in paths],
            lambda: index.search(np.ones(min(index.width, 1 << 20)), 3),
            lambda: list(index.embeddings()),
            lambda: made_by(index),
            *(lambda kind=kind: export(index, file.with_suffix(f".{kind}"), kind=kind) for kind in ("npz", "jsonl")),
        ):
            try:
                step()
            except (ValueError, OSError) as error:
                errors.append(error)
    with IndexWriter.open(file) as writer:
        shape = {1: (7,), 2: (2, 7), 3: (1, 2, 7)}[writer.axes]
        writer.add([Embedding("/new.jpg", 1, 2, bytes(32), np.ones(shape, np.float32))])
        writer.remove([*paths[:2], "/new.jpg"])
    if errors:
        raise errors[0]


def _broken_database(data: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.5:
        return broken_bytes(data[:200], dice) + data[200:]
    return broken_bytes(data, dice)


def _run(file: Path, statements: str, *values: Any) -> None:
    db = sqlite3.connect(file, isolation_level=None)
    try:
        if values:
            db.execute(statements, values)
        else:
            db.executescript(statements)
    except sqlite3.Error:  # as where the same value must not stand twice
        pass
    finally:
        db.close()


def _other_tokenizer(name: str) -> Path | None:
    file = Path(__file__).parents[1] / "golden" / "tokenizer" / name
    return file if file.is_file() else None


_processors: dict[Path, Any] = {}

_ARRAY: Any = None


def prepare(names: list[str]) -> None:
    """What every input of these kinds needs once in a process, so that no input's time is taken for it."""
    global _ARRAY
    import numpy as np

    for module in MODULES:
        importlib.import_module(module)
    if "pickles" in names:
        importlib.import_module("torch")

    _ARRAY = np.random.default_rng(1).integers(0, 256, (45, 61, 3), np.uint8)
