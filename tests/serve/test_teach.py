"""Labels taught by examples: marked, undone, kept beside the index, saved as a head."""

import json

import numpy as np
import pytest

from mlx_aimv2.learn import predict
from mlx_aimv2.serve.teach import Lessons


def mark(client, label, *ids):
    answer = client.post("/examples", json={"ids": list(ids), "label": label})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_two_examples_a_label_say_what_all_the_others_are(client):
    mark(client, "red", 0, 3)
    state = mark(client, "blue", 2, 5)
    assert [(one["label"], one["examples"]) for one in state["labels"]] == [("blue", 2), ("red", 2)]
    for label in ("red", "blue"):
        assert {one["name"].partition("-")[2] for one in state["certain"][label][:2]} == {f"{label}.png"}
    probabilities = [one["probability"] for one in state["uncertain"]]
    assert len(probabilities) == 8 and probabilities == sorted(probabilities)
    assert {one["id"] for one in state["uncertain"]}.isdisjoint({0, 2, 3, 5})


def test_a_change_is_undone_and_one_that_changes_nothing_is_no_step(client):
    mark(client, "red", 0, 3)
    assert mark(client, "red", 0)["steps"] == 1
    mark(client, "green", 0, 1)
    assert mark(client, None, 1)["steps"] == 3
    states = [client.post("/examples/undo").json() for _ in range(3)]
    assert [{one["id"]: one["label"] for one in state["examples"]} for state in states] == [
        {0: "green", 1: "green", 3: "red"},
        {0: "red", 3: "red"},
        {},
    ]
    assert "there is nothing to undo" in client.post("/examples/undo").json()["error"]["message"]


def test_nothing_is_lost_when_the_server_ends(client, served):
    mark(client, "red", 0)
    mark(client, "blue", 2)
    again = Lessons(served.gallery)
    assert again.examples == {0: "red", 2: "blue"}
    again.undo()
    assert Lessons(served.gallery).examples == {0: "red"}


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 1, "labels": {"a": 1}, "steps": []}'])
def test_a_file_of_somebody_else_is_refused_and_kept(served, content):
    file = served.gallery.index.path.with_name("photos-labels.json")
    file.write_text(content)
    with pytest.raises(ValueError, match=r"photos-labels\.json"):
        Lessons(served.gallery)
    assert file.read_text() == content


@pytest.mark.parametrize("label", ["", " ", "x" * 101, "a\0b", "\u202ex"])
def test_a_label_is_a_word_or_two(client, label):
    answer = client.post("/examples", json={"ids": [0], "label": label})
    assert answer.status_code == 400 and "a word or two" in answer.json()["error"]["message"]


def test_an_image_that_is_not_there_is_refused_whole(client):
    assert client.post("/examples", json={"ids": [0, 99], "label": "red"}).status_code == 404
    assert client.get("/examples").json()["examples"] == []


def test_the_probe_is_that_of_fit_on_the_same_vectors(client, served):
    mark(client, "red", 0, 3)
    mark(client, "blue", 2, 5)
    labels, probabilities = served.lessons.probabilities(served.lessons.examples)
    assert labels == ["blue", "red"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    names = [path.rpartition("-")[2] for path in served.gallery.paths]
    said = np.array(labels)[probabilities.argmax(axis=1)]
    assert [said[n] for n, name in enumerate(names) if name != "green.png"] == [
        name.partition(".")[0] for name in names if name != "green.png"
    ]


def test_saving_needs_two_labels(client):
    mark(client, "red", 0, 3)
    assert "at least two labels" in client.post("/examples/save").json()["error"]["message"]


@pytest.mark.slow
def test_what_is_saved_is_what_fit_makes_of_the_same_labels_to_the_bit(client, served, tmp_path):
    from mlx_aimv2.learn import fit

    for label, ids in (("red", range(0, 12, 3)), ("green", range(1, 12, 3)), ("blue", range(2, 12, 3))):
        mark(client, label, *ids)
    saved = client.post("/examples/save").json()
    assert saved["data"] == str(tmp_path / "photos-labels") and saved["head"] == str(tmp_path / "photos-head")
    fit(saved["data"], served.name, tmp_path / "own", refit=True)
    for file in ("head.safetensors",):
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "photos-head" / file).read_bytes()
    predictions = list(predict(saved["head"], served.gallery.paths))
    assert len(predictions) == 12
    again = client.post("/examples/save").json()
    assert again["head"] == str(tmp_path / "photos-head-2")
    assert json.loads((tmp_path / "photos-labels.json").read_text())["labels"]
