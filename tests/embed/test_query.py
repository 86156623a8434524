"""A query finds the images it fits, and what cannot be compared is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_aimv2.cli import main
from mlx_aimv2.convert import convert
from mlx_aimv2.index.reader import Index
from mlx_aimv2.index.writer import IndexWriter
from tests.image_files import image, noise, plain
from tests.small_index import change
from tests.small_lit import COLOURS, colour_lit, write

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """An index made with a LiT model that knows three colours by name."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "lit", model=colour_lit())
    for axis, name in enumerate(COLOURS):
        plain(tmp_path / "in" / f"{axis}.png", tuple(220 if i == axis else 20 for i in range(3)))
        assert name
    assert main(["embed", "in", "-m", "lit", "-o", "photos.db"]) == 0
    return tmp_path


def test_an_image_of_the_index_is_found_without_a_model(photo_index, search, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.encode.read_source", None)
    code, out, err = search("in/2.png", "-k", "3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0] == f" 1.0000  {photo_index / 'in' / '2.png'}"
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_any_other_image_goes_through_the_model(photo_index, search):
    shutil.copy("in/1.png", "query.png")
    _, out, _ = search("query.png", "-k", "1", "--json")
    found = json.loads(out)
    assert found["query"] == "query.png"
    assert found["images"] == 5
    assert found["matches"] == [{"path": str(photo_index / "in" / "1.png"), "score": pytest.approx(1, abs=1e-5)}]


def test_an_image_that_changed_since_is_embedded_as_it_is_now(photo_index, search):
    shutil.copy("in/1.png", "in/0.png")
    _, out, _ = search("in/0.png", "-k", "1", "--json")
    assert json.loads(out)["matches"][0]["path"].endswith("1.png")


@pytest.mark.parametrize("word", COLOURS)
def test_a_text_finds_the_images_it_fits(colours, search, word):
    code, out, _ = search(f"something {word}", "-k", "1", "--json")
    assert code == 0
    assert Path(json.loads(out)["matches"][0]["path"]).name == f"{COLOURS.index(word)}.png"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("a cat", "cannot be searched by words: give an image, or embed with -m apple/aimv2-large-patch14-224-lit"),
        ("cat.jpg", "cat.jpg does not exist: give an image or a text"),
        ("./cat", "does not exist"),
        ("https://example.org/cat.jpg", "is a URL: download it first"),
        ("in", "is a folder"),
        (" ", "empty"),
        ("notes.txt", "is not an image"),
    ],
)
def test_a_query_that_cannot_be_is_one_line(photo_index, search, query, message):
    Path("notes.txt").write_text("no image")
    code, out, err = search(query)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_other_weights_are_refused_by_name(photo_index, search):
    noise(photo_index / "query.png", 30)
    code, _, err = search("query.png", "-m", str(REFERENCE / "outlier"))
    assert code == 2
    assert "the weights" in err
    assert str(REFERENCE / "outlier") in err
    assert "width: 96 there, 128 here" in err


def test_the_same_weights_at_other_bits_are_a_note(photo_index, search):
    noise(photo_index / "query.png", 30)
    _, dense, _ = search("query.png", "--json")
    convert(REFERENCE / "fixed", "eight", quantize=True, q_bits=8, q_group_size=32, verify=False)
    code, out, err = search("query.png", "--json", "-m", "eight")
    assert code == 0
    assert "quantization: none there, bits=8 group_size=32 mode=affine here" in err
    assert [one["path"] for one in json.loads(out)["matches"]] == [one["path"] for one in json.loads(dense)["matches"]]


def test_a_model_that_moved_is_asked_for(tmp_path, monkeypatch, search):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REFERENCE / "fixed", "model")
    noise(tmp_path / "in" / "0.png", 0)
    assert main(["embed", "in", "-m", "model", "-o", "photos.db"]) == 0
    Path("model").rename("moved")
    noise(tmp_path / "query.png", 1)
    code, _, err = search("query.png")
    assert code == 2
    assert "give its new place with -m" in err
    assert search("query.png", "-m", "moved")[0] == 0


def test_an_index_from_python_without_a_description_is_refused(tmp_path, monkeypatch, search):
    monkeypatch.chdir(tmp_path)
    IndexWriter.create("photos.db", provenance={}, width=5, dtype="float16").close()
    code, _, err = search(str(noise(tmp_path / "query.png", 1)))
    assert code == 2
    assert "does not record which model made it" in err


def test_maps_cannot_be_searched(tmp_path, monkeypatch, search):
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "in" / "0.png", 0)
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "photos.db", "--pool", "map"]) == 0
    code, _, err = search("in/0.png")
    assert code == 2
    assert "has a map for each image" in err


def test_the_index_module_reads_what_the_command_wrote(photo_index):
    with Index.open("photos.db") as index:
        query = index.vector(str(photo_index / "in" / "3.png"))
        assert [Path(match.path).name for match in index.search(query, 1)] == ["3.png"]


def test_a_word_is_text_although_a_folder_of_that_name_lies_here(tmp_path, monkeypatch):
    from mlx_aimv2.embed.query import image_path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "red").mkdir()
    assert image_path("red") is None
    for path in ("./red", str(tmp_path / "red"), "red/"):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            image_path(path)


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        (["red", "-a", "green"], {"0.png", "1.png"}, "2.png"),
        (["red", "-s", "green"], {"0.png"}, "1.png"),
        (["3:red", "-a", "in/1.png"], {"0.png"}, "2.png"),
        (["in/1.png", "-a", "in/2.png", "-s", ".5:blue"], {"1.png"}, "0.png"),
    ],
)
def test_images_and_words_combine(colours, search, flags, first, last):
    assert COLOURS == ("red", "green", "blue")
    _, out, _ = search(*flags, "--json")
    names = [Path(match["path"]).name for match in json.loads(out)["matches"]]
    assert set(names[: len(first)]) == first
    assert names[-1] == last


def test_a_model_is_loaded_once_for_all_parts(colours, search, monkeypatch):
    from mlx_aimv2.embed import encode

    loads = []
    read_source = encode.read_source
    monkeypatch.setattr(encode, "read_source", lambda *args, **more: loads.append(args) or read_source(*args, **more))
    assert search("red", "-a", "blue", "-s", "green")[0] == 0
    assert len(loads) == 1


def test_one_in_front_of_a_text_keeps_a_number_in_it(colours):
    from mlx_aimv2.embed.query import Query, parse_query

    assert parse_query("2:1 ratio") == Query(None, "1 ratio", 2.0)
    assert parse_query("1:2:1 ratio") == Query(None, "2:1 ratio", 1.0)
    assert parse_query("at 10:30") == Query(None, "at 10:30", 1.0)
    shutil.copy("in/0.png", "2:0.png")
    assert parse_query("2:0.png") == Query(str(colours / "2:0.png"), "2:0.png", 1.0)
    with pytest.raises(ValueError, match="above 0"):
        parse_query("0:red")


def test_paths_alone_are_the_bytes_that_they_are(photo_index, capfdbinary):
    hostile = "new\nline.png"
    shutil.copy("in/1.png", f"in/{hostile}")
    assert main(["embed", "in", "-o", "photos.db"]) == 0
    capfdbinary.readouterr()
    assert main(["search", "photos.db", "in/0.png", "-0"]) == 0
    paths = capfdbinary.readouterr().out.split(b"\0")
    assert paths.pop() == b""
    assert str(photo_index / "in" / hostile).encode() in paths
    assert main(["search", "photos.db", "in/0.png", "--paths-only", "--under", "in", "-k", "1"]) == 0
    assert capfdbinary.readouterr().out == f"{photo_index}/in/0.png\n".encode()


@pytest.mark.parametrize("flag", ["--copy-to", "--link-to"])
def test_images_found_are_put_into_a_new_folder_the_best_first(photo_index, search, flag):
    shutil.copy("in/1.png", "query.png")
    Path("in/2.png").unlink()
    code, _, err = search("query.png", "-k", "5", flag, "found")
    assert code == 1
    assert "2.png no longer exists" in err
    names = sorted(path.name for path in Path("found").glob("[!.]*"))
    assert (names[0], len(names)) == ("1-1.png", 4)
    assert Path("found/1-1.png").is_symlink() is (flag == "--link-to")
    assert Path("found/1-1.png").read_bytes() == Path("in/1.png").read_bytes()
    code, _, err = search("query.png", flag, "found")
    assert code == 2
    assert "found as it already exists" in err


def test_copies_of_what_was_found_are_no_new_images(photo_index, search, capsys):
    assert search("in/1.png", "-k", "2", "--copy-to", "in/found")[0] == 0
    assert main(["embed", "in", "-o", "photos.db"]) == 0
    assert "1 of mlx-aimv2's own folders" in capsys.readouterr().err
    with Index.open("photos.db") as index:
        assert len(index) == 5


def test_nothing_found_is_said_and_makes_no_folder(photo_index, search):
    code, out, err = search("in/1.png", "--under", "nowhere", "--copy-to", "found")
    assert (code, out, err) == (0, "", "mlx-aimv2: no image in photos.db matches\n")
    assert not Path("found").exists()


def test_a_long_text_is_a_text_and_a_score_may_be_below_0(colours, capsys):
    assert main(["search", "photos.db", f"{COLOURS[0]} " * 60, "--min-score", "-0.5", "-f"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("0.png")


# --update


def names_of(out: str) -> list[str]:
    return sorted(Path(match["path"]).name for match in json.loads(out)["matches"])


def test_update_embeds_what_is_new_as_it_was_embedded_before(photo_index, search, capsys):
    noise(photo_index / "more" / "a.png", 11)
    more = ["embed", "mo*e", "-o", "photos.db", "--exclude", "b*", "--max-pixels", "3000"]
    assert main(more) == 0
    for name in ("in/new.png", "more/b.png", "more/c.png"):
        noise(photo_index / name, len(name))
    image(photo_index / "more" / "large.png", (61, 50))
    (photo_index / "elsewhere").mkdir()
    shutil.move("photos.db", "elsewhere/photos.db")
    capsys.readouterr()
    assert main(["search", "elsewhere/photos.db", "in/0.png", "--update", "--json", "-k", "99"]) == 1
    out, err = capsys.readouterr()
    assert {"new.png", "a.png", "c.png"} < set(names_of(out)) and not {"b.png", "large.png"} & set(names_of(out))
    assert "more/large.png has 61x50 pixels" in err and "6 images (1 embedded" not in err
    (photo_index / "more" / "large.png").unlink()
    assert main(["search", "elsewhere/photos.db", "in/0.png", "--update", "-f", "--after", "2000"]) == 0


def test_a_name_that_is_too_long_for_any_file_is_one_line(photo_index, capsys):
    assert main(["embed", "in", "a" * 5000, "-o", "photos.db"]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_update_searches_what_is_there_where_a_folder_is_gone(photo_index, search):
    shutil.move("in", "gone")
    code, out, err = search("gone/0.png", "--update", "--json")
    assert code == 1
    assert names_of(out) == names_of(search("gone/0.png", "--json")[1]) != []
    assert f"{photo_index}/in does not exist" in err and f"embed {photo_index}/in -o photos.db --prune" in err


def test_a_folder_that_is_gone_for_good_can_be_forgotten(photo_index, search):
    shutil.move("in", "new")
    assert main(["embed", "new", "-o", "photos.db"]) == 0
    assert search("new/0.png", "--update")[0] == 1
    assert main(["embed", "in", "-o", "photos.db", "--prune"]) == 0
    code, out, err = search("new/0.png", "--update", "--json", "-k", "99")
    assert code == 0 and "does not exist" not in err
    assert len(names_of(out)) == 5


@pytest.mark.parametrize("sources", [None, "{}"])
def test_an_index_that_does_not_know_its_folders_says_what_to_type(photo_index, search, sources):
    change(Path("photos.db"), "DELETE FROM about WHERE name = 'sources'")
    if sources is not None:
        change(Path("photos.db"), "INSERT INTO about VALUES ('sources', ?)", sources)
    code, out, err = search("in/0.png", "--update")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "run mlx-aimv2 embed FOLDER -o photos.db once" in err
    assert main(["embed", "in", "-o", "photos.db"]) == 0
    assert search("in/0.png", "--update")[0] == 0


@pytest.mark.parametrize(
    "sources",
    ["[]", "nonsense", "[" * 99999, '{"/in": 3}', '{"/in": {"exclude": 1, "include": [], "policy": {}}}',
     '{"/in": {"exclude": [], "include": [], "policy": {"decode": 7}}}',
     '{"/in": {"exclude": [], "include": [], "policy": {"new": 7}}}',
     '{"/in": {"exclude": [3], "include": [null], "policy": {"max_pixels": "x"}}}'],
)  # fmt: skip
def test_sources_from_an_untrusted_index_are_one_line(photo_index, search, sources):
    change(Path("photos.db"), "UPDATE about SET value = ? WHERE name = 'sources'", sources)
    code, out, err = search("in/0.png", "--update")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "photos.db is damaged" in err


def test_update_goes_beside_another_embed(photo_index, search):
    noise(photo_index / "in" / "new.png", 21)
    noise(photo_index / "more" / "a.png", 22)
    command = [sys.executable, "-m", "mlx_aimv2", "embed", "more", "-o", "photos.db"]
    with subprocess.Popen(command) as other:
        code, out, _ = search("in/0.png", "--update", "--json", "-k", "99")
    assert (code, other.returncode) == (0, 0)
    assert "new.png" in names_of(out)
    with Index.open("photos.db") as index:
        assert len(index) == 7
        assert sorted(index.sources) == [str(photo_index / "in"), str(photo_index / "more")]
