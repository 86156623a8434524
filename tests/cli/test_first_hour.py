"""What a newcomer meets in the first hour: defaults that suit the machine, mistakes in one line, equal exit codes."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import warnings
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_aimv2.backend import device
from mlx_aimv2.bundled import emoji_checkpoint, photographs
from mlx_aimv2.cli import dispatch, main
from mlx_aimv2.cli.bench import measure_speed, random_model, random_pixels
from mlx_aimv2.cli.dispatch import EXAMPLES, VERBS
from mlx_aimv2.cli.info_compare_export_upload import memory
from mlx_aimv2.cli.output import say
from mlx_aimv2.config import RELEASED, Aimv2VisionConfig
from mlx_aimv2.convert import convert
from mlx_aimv2.index.reader import Index
from mlx_aimv2.learn import fit
from mlx_aimv2.loading import Source
from mlx_aimv2.model import Aimv2VisionModel
from mlx_aimv2.train.loop import Plan, Step
from mlx_aimv2.train.optimizer import flat
from tests.labelled import CHECKPOINT, write_digits

IMAGE = str(photographs()[0])

FACTOR = 2.0
"""By which a peak of memory may differ from what `info` computes, as its docstring says."""


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> str:
    """The bundled pair in float16."""
    return str(convert(emoji_checkpoint(), tmp_path_factory.mktemp("half") / "pair", dtype="float16", verify=False))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a cache of its own."""
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# dtypes


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("embed", (IMAGE, "-m", "HALF", "-o", "a.db")),
        ("classify", (IMAGE, "-m", "HALF", "--labels", "cat,dog")),
        ("map", (IMAGE, "-m", "HALF")),
        ("compare", (str(emoji_checkpoint()), "HALF")),
    ],
)
def test_a_half_checkpoint_runs_in_what_suits_the_machine(verb, arguments, half, capsys, monkeypatch):
    used: list[mx.Dtype] = []

    def load(source: Source, **settings: object) -> object:
        loaded = real(source, **settings)
        used.append(loaded.model.dtype)
        return loaded

    real = Source.load
    monkeypatch.setattr(Source, "load", load)
    arguments = tuple(half if argument == "HALF" else argument for argument in arguments)
    for on, auto in (("cpu", mx.float32), ("metal", mx.bfloat16)):
        monkeypatch.setattr(device, "machine", lambda kind=on: device.Machine(kind, "a chip", None))
        for flags, wanted in (((), auto), (("--dtype", "float16"), mx.float16)):
            Path("a.db").unlink(missing_ok=True)
            assert run(capsys, verb, *arguments, *flags)[0] == 0
            assert used[-1] == wanted, (on, flags)


def test_an_index_keeps_the_dtype_that_it_was_made_with(half, capsys):
    """bfloat16 is neither the checkpoint's own nor what auto means here."""
    assert run(capsys, "embed", IMAGE, "-m", half, "-o", "a.db", "--dtype", "bfloat16")[0] == 0
    for arguments in ((), ("-m", half)):
        code, _, err = run(capsys, "embed", photographs()[1], "-o", "a.db", *arguments)
        assert (code, "differently" in err) == (0, False)
    with Index.open(Path("a.db")) as index:
        assert (len(index), index.provenance["dtype"]) == (2, "bfloat16")


# exit codes


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A folder with what commands work on: a head, an index, images, one that is broken, and captions."""
    place = tmp_path_factory.mktemp("stage")
    write_digits(place / "digits", per_class=4)
    fit(place / "digits", CHECKPOINT, place / "head", cache=place / "cache", fine_tune_type="knn")
    assert main(["embed", str(place / "digits"), "-m", str(CHECKPOINT), "-o", str(place / "a.db")]) == 0
    for name in ("mixed", "broken"):
        (place / name).mkdir()
        (place / name / "text.jpg").write_text("no image")
    shutil.copy(IMAGE, place / "mixed" / "good.jpg")
    (place / "empty").mkdir()
    (place / "captions").mkdir()
    shutil.copy(IMAGE, place / "captions" / "a.jpg")
    (place / "captions" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a photograph"}\n')
    (place / "text.txt").write_text("a text")
    return place


PAIR = str(emoji_checkpoint())
LISTED = {
    "embed": ("embed", "IT", "-m", PAIR, "-o", "new.db"),
    "classify": ("classify", "IT", "-m", PAIR, "--labels", "cat,dog"),
    "map": ("map", "IT", "-m", PAIR),
    "predict": ("predict", "STAGE/head", "IT"),
}
LABELLED = {
    "fit": ("fit", "IT", "-m", str(CHECKPOINT), "-o", "new"),
    "evaluate": ("evaluate", "STAGE/head", "IT"),
    "pretrain": ("pretrain", "IT", "-o", "new"),
    "lit": ("lit", "IT", "--encoder", str(CHECKPOINT), "-o", "new"),
    "compare": ("compare", PAIR, PAIR, "--images", "IT"),
    "convert": ("convert", "--hf-path", PAIR, "--calibration", "IT"),
}
INDEXED = {
    "search": ("search", "IT", "a dog"),
    "duplicates": ("duplicates", "IT"),
    "info": ("info", "IT"),
}
MODELS = {
    "embed": ("embed", IMAGE, "-m", "IT", "-o", "new.db"),
    "classify": ("classify", IMAGE, "-m", "IT", "--labels", "cat,dog"),
    "map": ("map", IMAGE, "-m", "IT"),
    "fit": ("fit", "STAGE/digits", "-m", "IT", "-o", "new"),
    "evaluate": ("evaluate", "STAGE/head", "STAGE/digits", "-m", "IT"),
    "predict": ("predict", "STAGE/head", IMAGE, "-m", "IT"),
    "search": ("search", "STAGE/a.db", IMAGE, "-m", "IT"),
    "lit": ("lit", "STAGE/captions", "--encoder", "IT", "-o", "new"),
    "compare": ("compare", PAIR, "IT"),
    "convert": ("convert", "--hf-path", "IT"),
    "info": ("info", "IT"),
    "bench": ("bench", "-m", "IT"),
    "fuse": ("fuse", "--adapter-path", "IT"),
    "upload": ("upload", "IT", "owner/name"),
}
KINDS = {
    "nothing is there": ("nowhere", 2, "nowhere", (LISTED, LABELLED, INDEXED)),
    "an empty folder": ("STAGE/empty", 2, "", (LISTED, LABELLED, INDEXED)),
    "a file instead of a folder or an index": ("STAGE/text.txt", 2, "text.txt", (LABELLED, INDEXED)),
    "an image is broken": ("STAGE/mixed", 1, "text.jpg", (LISTED,)),
    "all images are broken": ("STAGE/broken", 1, "text.jpg", (LISTED,)),
    "a text as an image": ("STAGE/text.txt", 1, "text.txt", (LISTED,)),
    "a model that is not there": ("owner/nowhere", 2, "owner/nowhere", (MODELS,)),
    "a folder without a model": ("STAGE/empty", 2, "empty", (MODELS,)),
    "a URL": ("https://huggingface.co/owner/name", 2, "is a URL: give the Hub name owner/name", (LISTED, MODELS)),
    "a URL of a file": ("https://example.org/a.jpg", 2, "is a URL: download it first", (LISTED, LABELLED, INDEXED)),
}
"""Kind of mistake: what stands for IT, the exit code, what stderr names, and the commands."""


@pytest.mark.parametrize(
    ("kind", "verb", "command"),
    [
        pytest.param(kind, verb, command, id=f"{kind}-{verb}")
        for kind, (*_, tables) in KINDS.items()
        for table in tables
        for verb, command in table.items()
    ],
)
def test_a_kind_of_failure_has_one_exit_code_in_every_verb(kind, verb, command, stage, capsys):
    it, wanted, named, _ = KINDS[kind]
    words = [word.replace("IT", it) if word == "IT" else word for word in command]
    code, out, err = run(capsys, *(word.replace("STAGE", str(stage)) for word in words))
    assert code == wanted, err
    assert named in err and "bug in mlx-aimv2" not in err
    lines = err.splitlines()
    assert len(set(lines)) == len(lines) and (code == 1 or not out)
    assert not Path("new").exists()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_run_that_is_interrupted_ends_with_130_in_every_verb(verb, monkeypatch, capsys):
    def stop(arguments: object) -> int:
        raise KeyboardInterrupt

    real = dispatch.function_of
    monkeypatch.setattr(dispatch, "function_of", lambda name, kind: stop if kind == "run" else real(name, kind))
    assert run(capsys, verb, *shlex.split(EXAMPLES[verb])) == (130, "", "mlx-aimv2: stopped\n")


# what is typed by mistake


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("emebd", "x"), "there is no verb emebd (did you mean embed?)"),
        (("--hlep",), "unrecognized arguments: --hlep (did you mean --help?)"),
        (("frobnicate",), "there is no verb frobnicate; the verbs are embed, search,"),
        (("embed", "x", "--ouptut", "y.db"), "unrecognized arguments: --ouptut (did you mean --output?); see"),
        (("embed", "x", "-o", "y.db", "--prun"), "unrecognized arguments: --prun (did you mean --prune?)"),
        (("embed", IMAGE, "-o", "y.db"), "choose a model, for example -m apple/aimv2-large-patch14-224-lit"),
        (("embed", IMAGE, "-o", "y.db", "-m", PAIR, "--dtype", "fp16"), "choose from 'float32', 'float16'"),
        (("info", "apple/aimv2-large-patch14-22"), "did you mean apple/aimv2-large-patch14-224?"),
        (("search", "a.db", "a", "dog"), "words that belong together need quotes"),
    ],
)
def test_a_mistake_is_one_line_with_what_to_type(arguments, wanted, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert wanted in err.replace("choose from float32, float16", "choose from 'float32', 'float16'")


def test_the_name_alone_shows_the_verbs(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert out.startswith("usage: mlx-aimv2 VERB") and all(verb in out for verb in VERBS)


def test_classify_takes_folders_by_the_rules_of_embed(stage, capsys):
    options = ("-m", PAIR, "--labels", "cat,dog", "--json", "--exclude", "digit 0/", "--exclude", "0*3.png")
    code, out, err = run(capsys, "classify", stage / "digits", stage / "empty", *options)
    paths = [Path(json.loads(line)["path"]) for line in out.splitlines()]
    wanted = sorted((stage / "digits").rglob("00[0-2].png"))
    assert (code, paths) == (0, [path for path in wanted if path.parent.name != "digit 0"])
    assert "skipped: " in err and "2 0*3.png" in err and f"no images in {stage / 'empty'}" in err
    assert "skipped: " in run(capsys, "embed", stage / "digits", "-o", "e.db", "-m", PAIR, *options[5:])[2]


# before the work begins


def test_a_note_is_written_once(capsys):
    def work() -> int:
        for _ in range(3):
            warnings.warn("the same", stacklevel=1)
            say("note: the same")
        return 0

    assert dispatch.one_line_errors(work) == 0
    assert capsys.readouterr().err == "mlx-aimv2: note: the same\n"


@pytest.mark.parametrize("name", RELEASED)
def test_info_knows_the_released_checkpoints_without_the_hub(name, capsys, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    code, out, _ = run(capsys, "info", f"apple/{name}", "--json")
    facts = json.loads(out)
    parameters = RELEASED[name].parameters
    assert code == 0 and facts["downloaded"] is False
    assert (facts["parameters"], facts["download"]) == (parameters, 4 * parameters)
    a_pass, a_step = facts["memory_of_a_pass"], facts["memory_of_a_training_step"]
    assert list(a_pass) == ["float32", "float16 or bfloat16", "8 bits", "4 bits"]
    assert sorted(a_pass.values(), reverse=True) == list(a_pass.values()) and a_pass["float32"] > 4 * parameters
    assert a_step["full, float32"] > a_step["lora, float32"] > a_pass["float32"]
    assert "GB (full, float32)" in run(capsys, "info", f"apple/{name}")[1]


@pytest.mark.parametrize(("width", "inner", "blocks", "pixels"), [(256, 704, 4, 224), (512, 1408, 3, 448)])
def test_the_memory_that_info_computes_is_what_a_pass_and_a_step_take(width, inner, blocks, pixels):
    config = Aimv2VisionConfig(width, inner, blocks, width // 128, image_size=pixels)
    model = random_model(config, mx.float32)
    parameters = sum(array.size for array in flat(model.parameters()).values())
    computed = memory(config, parameters)
    image = random_pixels(config, batch=1)
    peak = measure_speed(model, image, runs=1)["peak_bytes"] + 4 * parameters
    assert 1 / FACTOR < peak / computed["memory_of_a_pass"]["float32"] < FACTOR

    def losses(model: Aimv2VisionModel, batch: mx.array, key: mx.array) -> dict[str, mx.array]:
        return {"loss": mx.square(model(batch).last_hidden_state).mean()}

    step = Step(model, losses, Plan(steps=2, learning_rate=1e-4, weight_decay=0.1))
    before = mx.get_active_memory() - 4 * parameters
    for number in range(2):  # the moments are there from the second on
        mx.reset_peak_memory()
        step(number, lambda number: (image, number))  # type: ignore[arg-type]
    peak = mx.get_peak_memory() - before
    assert 1 / FACTOR < peak / computed["memory_of_a_training_step"]["full, float32"] < FACTOR


@pytest.mark.parametrize(
    ("stages", "command"),
    [
        (("scanning", "loading", "0/2"), LISTED["embed"]),
        (("loading", "0/2"), LISTED["classify"]),
        (("loading", "predicting 2 images"), LISTED["predict"]),
        (("loading", "evaluating 12 images"), ("evaluate", "STAGE/head", "STAGE/digits")),
        (("scanning", "loading", "0/12"), ("fit", "STAGE/digits", "-m", str(CHECKPOINT), "-o", "new")),
        (("loading",), ("convert", "--hf-path", PAIR, "--no-verify")),
        (("scanning",), ("pretrain", "STAGE/captions", "-o", "new")),
        (("scanning", "loading"), ("lit", "STAGE/captions", "--encoder", str(CHECKPOINT), "-o", "new")),
    ],
)
def test_a_bar_stands_at_nothing_with_what_is_happening(stages, command, stage, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    words = ("STAGE/mixed" if word == "IT" else word for word in command)
    _, _, err = run(capsys, *(word.replace("STAGE", str(stage)) for word in words))
    places = [err.find(words if "/" in words else f"{words}:   0%") for words in stages]
    assert -1 not in places and places == sorted(places), err
