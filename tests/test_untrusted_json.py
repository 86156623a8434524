"""JSON of others is bounded and typed in one place, by whichever door it comes in."""

import json

import mlx.core as mx
import pytest

from mlx_aimv2 import load
from mlx_aimv2.images.find import Scan
from mlx_aimv2.learn import detect, fit
from mlx_aimv2.learn.head_folder import fuse, load_head
from mlx_aimv2.learn.samples import DataError
from mlx_aimv2.learn.tables import metadata_rows
from mlx_aimv2.pretrain.data import open_data
from mlx_aimv2.untrusted_json import MAX_DEPTH, MAX_DIGITS, are_numbers, misfit, parse
from tests.small_training import Workshop, stopping_at

DEEP = "[" * MAX_DEPTH + "]" * MAX_DEPTH

HOSTILE = {
    "deeper than Python follows": "[" * 100_000,
    "objects deeper than Python follows": '{"a":' * 100_000,
    "deeper than is read": f"[{DEEP}]",
    "a number that no float holds": f"[{'7' * (MAX_DIGITS + 1)}]",
    "a number that Python refuses": "1" * 5000,
    "half of it": '{"a": [1, 2',
    "half of a character": '{"a": ["\\ud800"]}',
    "nothing": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_nothing_could_hold_is_one_short_line(text):
    with pytest.raises(ValueError, match=r"^x\.json: not (readable )?JSON") as caught:
        parse(text, "x.json")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("content", [DEEP, f"[{'7' * MAX_DIGITS}]", b"\xef\xbb\xbf{}", '["caf\\udce9 \\ud83d\\ude00"]'])
def test_what_is_within_bounds_is_read(content):
    value = parse(content, "x.json")
    assert isinstance(value, (dict, list))


def test_bytes_that_are_no_text_are_one_line():
    with pytest.raises(ValueError, match="x: not JSON"):
        parse(b"\xff\xfe{}", "x")


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (3, int, True),
        (True, int, False),
        (True, bool, True),
        (3.5, (int, float), True),
        (3.5, int, False),
        (float("nan"), (int, float), False),
        (float("inf"), float, False),
        ("3", int, False),
        (None, (str, type(None)), True),
        ([], list, True),
    ],
    ids=repr,
)
def test_a_field_is_of_its_type_and_finite(value, kind, fits):
    assert misfit({"a": value, "b": "x"}, {"b": str, "a": kind}) == (None if fits else "a")


def test_what_is_no_object_has_no_field():
    assert misfit([1], {"a": int}) == misfit({"b": 1}, {"a": int}) == misfit(None, {"a": int}) == "a"


@pytest.mark.parametrize("value", ["12", [1, "2"], [1, float("inf")], [True], {"a": 1}, None, [[1]]], ids=repr)
def test_only_lists_of_finite_numbers_are_numbers(value):
    assert are_numbers([1, -2.5]) and are_numbers([])
    assert not are_numbers(value)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def adapted(work):
    """A head folder with adapters."""
    return work.head("classify", "lora", iters=1)


def _config(folder, text, work, adapted):
    (folder / "config.json").write_text(text)
    load(folder)


def _head(folder, text, work, adapted):
    (folder / "head.json").write_text(text)
    load_head(folder)


def _adapters(folder, text, work, adapted):
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapters.safetensors").write_bytes((adapted / "adapters.safetensors").read_bytes())
    fuse(folder, folder / "fused", model=str(work.encoder))


def _coco(folder, text, work, adapted):
    (folder / "_annotations.coco.json").write_text(text)
    detect.TASK.data.read(folder)


def _rows(folder, text, work, adapted):
    (folder / "metadata.jsonl").write_text(f'{text}\n{{"file_name": "a.png", "label": "a"}}\n')
    rows = metadata_rows(folder / "metadata.jsonl", scan := Scan())
    assert [row["file_name"] for row in rows] == ["a.png"]
    raise DataError(scan.faults or [f"{folder / 'metadata.jsonl'} has an empty line"])


DOORS = {"config": _config, "head": _head, "adapters": _adapters, "coco": _coco, "rows": _rows}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_through_every_door_it_is_one_line_that_names_the_file(tmp_path, work, adapted, door, text):
    with pytest.raises((ValueError, OSError), match=r"\.json") as caught:
        door(tmp_path, text, work, adapted)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


WRONG_ADAPTERS = {
    "a rank beyond every layer": {"rank": 10**8},
    "no rank": {"rank": 0},
    "a scale that is none": {"scale": float("nan")},
    "an endless scale": {"scale": 1e999},
    "keys that are no names": {"keys": [1, None]},
    "keys of another kind": {"keys": {"a": 1}},
    "dropout as text": {"dropout": "x"},
}


@pytest.mark.parametrize("change", WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS)
def test_adapters_of_no_sense_are_refused(tmp_path, work, adapted, change):
    config = json.loads((adapted / "adapter_config.json").read_text())
    config["lora_parameters"] |= change
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        _adapters(tmp_path, json.dumps(config), work, adapted)


WRONG_HEADS = {
    "no encoder": ({"encoder": {}}, "encoder is {}"),
    "a sample of texts": ({"encoder": {"weights": {"digest": "x", "sample": ["a"] * 900}}}, "another encoder"),
    "a size that is none": ({"image_size": True}, "image_size is True"),
    "a type of another task": ({"fine_tune_type": "decoder"}, "fine_tune_type is .decoder."),
}


@pytest.mark.parametrize(("change", "words"), WRONG_HEADS.values(), ids=WRONG_HEADS)
def test_heads_of_no_sense_are_refused(tmp_path, work, adapted, change, words):
    info = json.loads((adapted / "head.json").read_text())
    for name, value in change.items():
        info[name] = info[name] | value if isinstance(value, dict) and value else value
    with pytest.raises(ValueError, match=words):
        _head(tmp_path, json.dumps(info), work, adapted)


@pytest.mark.parametrize("use", ["predict", "fuse"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, work, adapted, use):
    for file in adapted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / {"predict": "head.safetensors", "fuse": "adapters.safetensors"}[use]
    arrays = dict(mx.load(str(file)))
    name = sorted(arrays)[0]
    mx.save_safetensors(str(file), arrays | {name: mx.full(arrays[name].shape, float("nan"))})
    with pytest.raises(ValueError, match=f"{file.name} is damaged: {name} has values that are not numbers"):
        load_head(tmp_path) if use == "predict" else fuse(tmp_path, tmp_path / "fused")


WRONG_STATES = {
    "no numbers": lambda progress: {**progress, "positions": ["x"]},
    "a field more": lambda progress: {**progress, "x": 1},
    "a field less": lambda progress: {name: value for name, value in progress.items() if name != "stale"},
    "a text for a number": lambda progress: {**progress, "step": "2"},
    "a step before the first": lambda progress: {**progress, "step": -1},
    "a step after the last": lambda progress: {**progress, "step": 1 << 70},
    "a list": lambda progress: [],
}


@pytest.mark.parametrize("change", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_state_of_no_sense_is_refused(tmp_path, work, change):
    def run(**settings):
        fit(work.data["classify"], work.encoder, tmp_path / "head", task="classify", fine_tune_type="attentive",
            cache=work.folder / "cache", iters=4, steps_per_eval=1, **settings)  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(on_progress=stopping_at(2))
    file = tmp_path / "head.training" / "state.safetensors"
    tensors, about = mx.load(str(file), return_metadata=True)
    mx.eval(tensors)
    progress = change(json.loads(about["progress"]))
    mx.save_safetensors(str(file), tensors, metadata={**about, "progress": json.dumps(progress)})
    with pytest.raises(
        ValueError, match=r"state\.safetensors is damaged, or from another version: remove .*head\.training"
    ):
        run(resume=True)


def test_a_shard_whose_json_is_endless_has_no_caption(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in (("0.png", b"x"), ("0.json", b"[" * 100_000), ("1.png", b"x"), ("1.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.warns(UserWarning, match="has no caption"):
        assert [example.texts for example in open_data(tmp_path).epoch(None)] == [("a cat",)]
