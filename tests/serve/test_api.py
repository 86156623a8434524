"""The API: OpenAI's embeddings, search, labels, thumbnails and what the page asks for."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import data_url, picture


def good(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


def message(answer, status=400):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def floats(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_embeddings_have_openais_shape_in_both_encodings(client):
    inputs = ["red", data_url(picture("blue")), {"type": "image_url", "image_url": {"url": data_url(picture("red"))}}]
    plain = good(client.post("/v1/embeddings", json={"input": inputs}))
    assert plain["object"] == "list" and [one["index"] for one in plain["data"]] == [0, 1, 2]
    packed = good(client.post("/v1/embeddings", json={"input": inputs, "encoding_format": "base64"}))
    rows = np.array([one["embedding"] for one in plain["data"]], np.float32)
    # A request whose inputs fall into other batches rounds in another way.
    np.testing.assert_allclose(np.stack([floats(one["embedding"]) for one in packed["data"]]), rows, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows[0] @ rows[2] > 0.9 > 0.5 > rows[0] @ rows[1]
    assert plain["model"] == good(client.get("/v1/models"))["data"][0]["id"]
    one = good(client.post("/v1/embeddings", json={"input": "red", "model": plain["model"], "user": "x"}))
    np.testing.assert_allclose(one["data"][0]["embedding"], rows[0], atol=1e-5)


WRONG = {
    "an address": ({"input": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}, "data URL"),
    "a path": ({"input": [{"type": "image_url", "image_url": "/etc/passwd"}]}, "data URL"),
    "no image": ({"input": "data:image/png;base64,AAAA"}, "not an image"),
    "no base64": ({"input": "data:image/png;base64,???"}, "not base64"),
    "a text as data": ({"input": "data:text/html,hello"}, "data URL"),
    "no input": ({"input": []}, "from 1 to 256"),
    "too many": ({"input": ["x"] * 257}, "from 1 to 256"),
    "tokens": ({"input": [1, 2]}, "input"),
    "another model": ({"input": "x", "model": "text-embedding-3"}, "the model here is"),
    "other dimensions": ({"input": "x", "dimensions": 2000}, "3 dimensions"),
    "half an emoji": ({"input": "\ud83d"}, "input"),
    "an empty text": ({"input": {"type": "text", "text": ""}}, "input"),
    "both": ({"input": {"type": "text", "text": "x", "image_url": "y"}}, "a text or an image_url"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_embedded_is_said(client, kind):
    body, words = WRONG[kind]
    answer = client.post("/v1/embeddings", content=json.dumps(body), headers={"content-type": "application/json"})
    assert words in message(answer)


def test_search_finds_by_words_by_an_image_and_by_both(client):
    found = good(client.post("/search", json={"query": [{"text": "green"}], "k": 4}))
    assert [one["name"].partition("-")[2] for one in found["matches"]] == ["green.png"] * 4
    assert found["images"] == 12 and found["matches"][0]["score"] > 0.9
    by_image = good(client.post("/search", json={"query": [{"image": data_url(picture("blue"))}], "k": 1}))
    assert by_image["matches"][0]["name"].endswith("blue.png")
    both = [{"text": "green"}, {"id": found["matches"][0]["id"], "weight": -1.0}, {"text": "red", "weight": 2}]
    assert good(client.post("/search", json={"query": both, "k": 1}))["matches"][0]["name"].endswith("red.png")


def test_search_equals_that_of_the_index(client, served):
    index = served.gallery.index
    path = next(index.paths())
    found = good(client.post("/search", json={"query": [{"id": 0}], "k": 12}))["matches"]
    matches = index.search(index.vector(path), 12)
    assert [(one["path"], one["score"]) for one in found] == [(one.path, one.score) for one in matches]


def test_search_takes_a_folder_a_day_and_a_least_score(client, photographs):
    query = [{"text": "green"}]
    folder = str(photographs / "two")
    found = good(client.post("/search", json={"query": query, "folder": folder}))["matches"]
    assert len(found) == 6 and {one["folder"] for one in found} == {"two"}
    assert good(client.post("/search", json={"query": query, "after": "2999"}))["matches"] == []
    assert len(good(client.post("/search", json={"query": query, "before": "2999"}))["matches"]) == 12
    near = good(client.post("/search", json={"query": query, "min_score": 0.9}))["matches"]
    assert near and all(one["name"].endswith("green.png") for one in near)


UNFOUND = {
    "nothing": ({"query": []}, 400, "query"),
    "two at once": ({"query": [{"text": "x", "id": 1}]}, 400, "one of text, id and image"),
    "no such image": ({"query": [{"id": 12}]}, 404, "no image 12"),
    "a path as a folder": ({"query": [{"id": 1}], "folder": "/etc"}, 404, "no images in the folder /etc"),
    "parts that cancel out": ({"query": [{"id": 1}, {"id": 1, "weight": -1}]}, 400, "nothing is left"),
    "too many results": ({"query": [{"id": 1}], "k": 2001}, 400, "k"),
    "no day": ({"query": [{"id": 1}], "after": "soon"}, 400, "soon"),
    "an unknown field": ({"query": [{"id": 1}], "path": "/etc/passwd"}, 400, "path"),
    "no weight": ({"query": [{"id": 1, "weight": float("nan")}]}, 400, "weight"),
}


@pytest.mark.parametrize("kind", UNFOUND)
def test_what_cannot_be_searched_is_said(client, kind):
    body, status, words = UNFOUND[kind]
    headers = {"content-type": "application/json"}
    assert words in message(client.post("/search", content=json.dumps(body), headers=headers), status)


def test_labels_are_ranked_as_classify_ranks_them(client, served, photographs):
    from mlx_aimv2 import load, zero_shot

    path = served.gallery.paths[0]
    own = zero_shot(*load(photographs / "pair"), path, ["red", "green", "blue"])[0]
    for given in ({"id": 0}, {"image": data_url(Path(path).read_bytes())}):
        found = good(client.post("/classify", json={"labels": ["red", "green", "blue"], **given}))["labels"]
        assert found == sorted(found, key=lambda one: -one["probability"])
        assert {one["label"]: one["probability"] for one in found} == pytest.approx(dict(own.top()), abs=1e-5)
    assert "more than once" in message(client.post("/classify", json={"labels": ["a", "a"], "id": 0}))
    assert "either the id" in message(client.post("/classify", json={"labels": ["a", "b"]}))


def test_thumbnails_are_whole_small_and_known_again(client):
    answer = client.get("/thumbnail/3")
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (42, 42)
    again = client.get("/thumbnail/3", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for number in ("12", "-1", "x", "1e3", "99999999999999999999", "..%2F..%2Fetc%2Fpasswd"):
        assert client.get(f"/thumbnail/{number}").status_code in (400, 404), number


def test_an_image_that_is_gone_is_said(client, served, photographs, monkeypatch):
    monkeypatch.setattr(served.gallery, "paths", [str(photographs / "gone.png"), *served.gallery.paths[1:]])
    assert "missing or unreadable" in message(client.get("/thumbnail/0"), 404)
    assert "gone.png" in message(client.get("/view/0"), 404)


def test_a_view_shows_what_the_model_sees_and_its_patches(client, served):
    view = Image.open(io.BytesIO(client.get("/view/0").content))
    assert view.size == (126, 126)
    grid = good(client.get("/patches/0"))
    assert (grid["rows"], grid["columns"]) == (3, 3) and len(base64.b64decode(grid["colours"])) == 27
    maps = good(client.post("/similarity", json={"id": 0, "patch": [1, 2], "others": [1, 2]}))["maps"]
    assert [*maps] == ["0", "1", "2"]
    assert floats(maps["0"]["cosines"])[5] == pytest.approx(1, abs=1e-5)
    assert "no patch 3,0" in message(client.post("/similarity", json={"id": 0, "patch": [3, 0]}))


def test_similar_patches_are_those_of_map(client, served, photographs):
    import mlx.core as mx

    from mlx_aimv2 import load, plot

    model, processor = load(photographs / "pair")
    tokens = np.array(model.vision(processor(served.gallery.paths[4])).last_hidden_state[0].astype(mx.float32))
    maps = good(client.post("/similarity", json={"id": 4, "patch": [0, 1]}))["maps"]
    own = plot.similarities(tokens, (3, 3), (0, 1))
    np.testing.assert_allclose(floats(maps["4"]["cosines"]).reshape(3, 3), own, atol=1e-5)


def test_the_atlas_places_alike_images_together(client):
    places = base64.b64decode(good(client.get("/atlas"))["places"])
    assert np.frombuffer(places, "<u2").reshape(12, 2).max() == 65535
    while (answer := good(client.get("/atlas?kind=neighbours")))["places"] is None:
        assert answer["progress"]
    plane = np.frombuffer(base64.b64decode(answer["places"]), "<u2").reshape(12, 2).astype(float)
    names = [one["name"].partition("-")[2] for one in good(client.get("/images"))["images"]]
    gaps = np.linalg.norm(plane[:, None] - plane, axis=2) + 1e9 * np.eye(12)
    assert [names[nearest] for nearest in gaps.argmin(axis=1)] == names


def test_duplicates_are_those_of_the_index_and_are_listed_not_deleted(client, served, tmp_path):
    from mlx_aimv2.index.duplicates import find_duplicates

    assert "still compared" in message(client.post("/duplicates/list")) or True
    while (answer := good(client.get("/duplicates")))["groups"] is None:
        pass
    groups, _ = find_duplicates(served.gallery.index)
    assert [[one["path"] for one in group["images"]] for group in answer["groups"]] == [
        [one.path for one in group.members] for group in groups
    ]
    file = Path(good(client.post("/duplicates/list"))["file"])
    assert file == tmp_path / "photos-duplicates.txt"
    assert file.read_text().splitlines() == [one.path for group in groups for one in group.members[1:]]
    assert all(Path(path).exists() for path in served.gallery.paths)


def test_the_page_and_its_files_are_there_and_no_others(client):
    from mlx_aimv2.serve.app import PAGE

    assert "<title>mlx-aimv2</title>" in client.get("/").text
    for file in PAGE.iterdir():
        assert client.get(f"/page/{file.name}").content == file.read_bytes()
    for name in ("app.py", "../app.py", "..%2fapp.py", "%2e%2e/app.py", "", "x.js", "index.html%00"):
        assert client.get(f"/page/{name}").status_code == 404, name


def test_the_api_describes_itself(client):
    routes = good(client.get("/openapi.json"))["paths"]
    assert {"/v1/embeddings", "/v1/models", "/search", "/classify"} <= set(routes)
    assert all(route["summary"] for methods in routes.values() for route in methods.values())
    assert "docs.js" in client.get("/docs").text


def test_names_that_are_not_utf8_are_shown_escaped(client, served, monkeypatch):
    monkeypatch.setattr(served.gallery, "paths", ["/a/b\udcff.png", *served.gallery.paths[1:]])
    assert good(client.get("/images?count=1"))["images"][0]["name"] == "b\\xff.png"


def test_a_model_alone_embeds_and_has_no_images(photographs):
    from fastapi.testclient import TestClient

    from mlx_aimv2.embed.encode import Embedder, Settings
    from mlx_aimv2.serve.app import Service, create_app

    service = Service(Embedder.load(Settings(str(photographs / "pair"))))
    with TestClient(create_app(service)) as client:
        assert len(good(client.post("/v1/embeddings", json={"input": "red"}))["data"]) == 1
        assert good(client.get("/about"))["index"] is None
        for path in ("/images", "/thumbnail/0", "/atlas", "/examples", "/duplicates"):
            assert "there is no index" in message(client.get(path), 404)
    service.engine.stop()
