"""Several labels an image, and numbers: read, learned, told; probabilities that are calibrated, and none of these."""

import csv
import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import load
from mlx_aimv2.cli import main
from mlx_aimv2.export import export
from mlx_aimv2.images.open import open_image
from mlx_aimv2.learn import evaluate, fit, predict
from mlx_aimv2.learn.classify import head as heads
from mlx_aimv2.learn.classify import multilabel, regression, results
from mlx_aimv2.learn.classify.linear import fit_penalised
from mlx_aimv2.learn.samples import DataError, Sample
from tests.small_training import write_encoder

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("tiny") / "encoder")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seventy images that are red, green and blue in any combination, and which; five right in `train`'s order."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(3)
    have = rng.random((70, 3)) < 0.5
    for i, own in enumerate(have):
        levels = np.clip(rng.normal(60, 15, (43, 43, 3)) + 120 * own, 0, 255)
        Image.fromarray(levels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder, have


@pytest.fixture
def data(images, tmp_path, monkeypatch):
    """A folder of links to the images, for a table of its own."""
    monkeypatch.setenv("MLX_AIMV2_CACHE", str(tmp_path / "cache"))
    folder, have = images
    place = tmp_path / "data"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).hardlink_to(file)
    return place, have


def write_lists(place, have, **changes):
    rows = [
        {"file_name": f"{i:02}.png", "labels": [name for name, is_so in zip(COLOURS, own, strict=True) if is_so]}
        for i, own in enumerate(have)
    ]
    (place / "metadata.jsonl").write_text("\n".join(json.dumps(row | changes) for row in rows))


def write_csv(place, header, rows):
    with (place / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", *header], *([f"{i:02}.png", *row] for i, row in enumerate(rows))])


SHORT = {"linear": {}, "knn": {}, "attentive": {"epochs": 2}, "lora": {"iters": 2}, "full": {"iters": 2}}


@pytest.mark.parametrize("kind", SHORT)
def test_several_labels_are_learned_from_lists_and_from_columns_alike(kind, data, tiny, tmp_path, capsys):
    place, have = data
    settings = {"task": "multilabel", "fine_tune_type": kind, "holdout": 0.2, **SHORT[kind]}
    write_lists(place, have)
    fitted = fit(place, tiny, tmp_path / "head", **settings)
    assert {"map", "f1"} <= set(fitted.scores["test"]) and fitted.scores["test"]["map"] > 0.8
    (place / "metadata.jsonl").unlink()
    write_csv(place, COLOURS, have.astype(int))
    again = fit(place, tiny, tmp_path / "again", **settings)
    assert again.scores["test"]["map"] == pytest.approx(fitted.scores["test"]["map"], abs=0.05)
    assert main(["evaluate", str(fitted.folder), str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 70
    assert main(["predict", str(fitted.folder), f"{place}/*.png", "--json", "-o", str(tmp_path / "out")]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()))
    assert [[name for name in COLOURS if row[name] == "1"] for row in rows] == [
        [name for name in COLOURS if name in one["labels"]] for one in told
    ]


@pytest.mark.parametrize("kind", SHORT)
def test_numbers_are_learned_in_their_own_units(kind, data, tiny, tmp_path, capsys):
    place, have = data
    wanted = 40_000 + 3_000.0 * have @ [1, -2, 4]
    write_csv(place, ["age"], wanted[:, None])
    fitted = fit(place, tiny, tmp_path / "head", task="regression", fine_tune_type=kind, holdout=0.2, **SHORT[kind])
    assert fitted.scores["test"]["r2"] > 0.7
    found = [number for _, number in predict(fitted.folder, f"{place}/*.png")]
    assert evaluate(fitted.folder, place).scores["rmse"] == pytest.approx(np.sqrt(np.mean((found - wanted) ** 2)))
    assert main(["predict", str(fitted.folder), str(place / "00.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == pytest.approx(found[0])


@pytest.mark.parametrize(("task", "name"), [("multilabel", "probabilities"), ("regression", "number")])
def test_what_is_exported_gives_what_predict_gives(task, name, data, tiny, tmp_path):
    place, have = data
    is_several = task == "multilabel"
    write_csv(place, COLOURS if is_several else ["label"], have.astype(int) if is_several else have[:, :1] + 7)
    folder = fit(place, tiny, tmp_path / "head", task=task).folder
    file = export(folder, tmp_path / "labels.mlxfn", input="uint8")
    described = json.loads((tmp_path / "labels.json").read_text())
    assert described["outputs"][0]["name"] == name
    assert ("thresholds" in described) == (task == "multilabel")
    [(_, wanted)] = predict(folder, place / "00.png")
    levels = load(tiny)[1].levels(open_image(place / "00.png"))
    found = np.array(mx.import_function(str(file))(mx.array(levels)[None])[0])[0]
    np.testing.assert_allclose(found, getattr(wanted, "probabilities", wanted), rtol=1e-4)


REFUSED = {
    "text": (
        "regression",
        ["label"],
        lambda have: [["red"]] * 70,
        "has texts as labels, 'red' for one",
    ),
    "nan": ("regression", ["label"], lambda have: [["nan"], *[[1], [2]] * 35][:70], "has 'nan', no number"),
    "constant": ("regression", ["label"], lambda have: [[3]] * 70, "all images of train have the number 3"),
    "two numbers": ("regression", ["a", "b"], lambda have: have[:, :2] + 0.5, "has 2 columns that may be it (a, b)"),
    "never": ("multilabel", ["a", "b"], lambda have: have[:, :2] * [1, 0], "b is on no image of train"),
    "always": ("multilabel", ["a", "b"], lambda have: have[:, :2] * [1, 0] + [0, 1], "b is on every image of train"),
    "no columns": ("multilabel", ["a"], lambda have: have[:, :1] + 2, "has no labels in its columns (a)"),
    "a gap": (
        "multilabel",
        ["a", "b"],
        lambda have: [["", 1], *have[1:, :2].astype(int)],
        "neither 0 nor 1 under a",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learned_is_refused_in_one_line(case, data, tiny, tmp_path, capsys):
    place, have = data
    task, header, rows, words = REFUSED[case]
    write_csv(place, header, rows(have.astype(int)))
    assert main(["fit", str(place), "-m", str(tiny), "-o", str(tmp_path / "head"), "--task", task]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_label_that_val_does_not_have_is_refused(data, tiny, tmp_path):
    place, have = data
    parts = np.array(["train", "val"]).repeat(35)[:, None]
    rows = np.concatenate([have.astype(int), parts.astype(object)], axis=1)
    rows[35:, 2] = 0
    write_csv(place, [*COLOURS, "split"], rows)
    with pytest.raises(DataError, match="blue is on no image of val"):
        fit(place, tiny, tmp_path / "head", task="multilabel")


def test_folders_hold_neither_several_labels_nor_numbers(data, tiny, tmp_path):
    place, _ = data
    for task in ("multilabel", "regression"):
        with pytest.raises(DataError, match="has no table of images: make a metadata"):
            fit(place, tiny, tmp_path / "head", task=task)


def sample(target):
    return Sample("", b"", (1, 1), target)


def test_metrics_are_scikit_learns():
    """scikit-learn 1.9.1: average_precision_score, f1_score, r2_score, and two errors."""
    rng = np.random.default_rng(5)
    marks = (rng.random((31, 5)) < 0.4).astype(int)
    likely = np.round(np.clip(0.3 * marks + 0.7 * rng.random((31, 5)), 0, 1), 1)
    found = [multilabel.Tags(row, np.array([0.3, 0.4, 0.5, 0.6, 0.7])) for row in likely]
    scores, _ = multilabel.score([sample(tuple(row)) for row in marks], found, list("abcde"))
    wanted = {"map": 0.673713033084127, "f1": 0.6179309038291312, "f1_micro": 0.6285714285714286}
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    truth = rng.normal(20, 7, 31)
    numbers = truth + rng.normal(0, 3, 31)
    scores, _ = regression.score([sample((number,)) for number in truth], numbers.tolist(), ["number"])
    wanted = {"r2": 0.8740159433714824, "rmse": 2.6283976980067343, "mae": 2.1497017326605183}
    assert scores == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("l2", "rest", "ridge"),
    [
        (1e-1, 1.2673915126185276, 2.9461829647649154),
        (1e-3, 0.4029628460928818, 0.34255562356438024),
        (1e-5, 0.10325272357628625, 0.3135425569492189),
    ],
)
def test_linear_maps_reach_scikit_learns_objective(l2, rest, ridge):
    """scikit-learn 1.9.1: LogisticRegression(C=1/(n l2)) for each label, summed, and Ridge(alpha=n l2) over 2 n."""
    rng = np.random.default_rng(5)
    rng.random((31, 5)), rng.random((31, 5)), rng.normal(20, 7, 31), rng.normal(0, 3, 31)
    x, w = rng.normal(size=(53, 11)), rng.normal(size=(11, 3))
    marks = (x @ w + rng.normal(size=(53, 3)) > 0).astype(int)
    numbers = x @ w[:, :1] * 3 + 40 + rng.normal(size=(53, 1))
    assert fit_penalised(x, marks, 3, l2=l2)[1] == pytest.approx(rest, rel=1e-4)
    assert fit_penalised(x, numbers, 1, l2=l2)[1] == pytest.approx(ridge, rel=1e-9)


def test_the_temperature_is_found_and_a_val_of_which_all_is_right_makes_no_certainty():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = (shares.cumsum(axis=1) < rng.random((len(shares), 1))).sum(axis=1)
    made = heads.MeanHead(3, 5)
    heads.calibrate(made, 3 * logits, [sample(int(target)) for target in targets])
    assert 1 / made.scale == pytest.approx(3, rel=0.05)
    heads.calibrate(made, 3 * np.eye(5), [sample(i) for i in range(5)])
    assert 0.8 < results.decode({"logits": 3 * made.scale * np.eye(5)[0]}, (1, 1)).probabilities[0] < 0.99
    assert results.calibration_error(np.array([0.9, 0.9, 0.2]), np.array([1, 0, 0])) == pytest.approx((0.8 + 0.2) / 3)


def test_below_the_score_that_is_asked_for_it_is_none_of_these(data, tiny, tmp_path, capsys):
    place, have = data
    write_csv(place, COLOURS, have.astype(int))
    head, image = fit(place, tiny, tmp_path / "head", task="multilabel").folder, str(place / "00.png")
    [(_, found)] = predict(head, image, min_score=0.0)
    assert len(found.best()) == 3
    assert main(["predict", str(head), image, "--min-score", "1"]) == 0
    assert capsys.readouterr().out == f"{image}\nnone of these\n"
    assert main(["predict", str(head), image, "--min-score", "1.5"]) == 2
    assert "--min-score must be from 0 to 1, got 1.5" in capsys.readouterr().err
    write_csv(place, ["label"], np.where(have[:, :1], "red", "other"))
    head = fit(place, tiny, tmp_path / "classes").folder
    [(_, found)] = predict(head, image, min_score=1.0)
    assert results.as_json(found, ["other", "red"])["label"] == "none of these"
