"""What the Hub, its cache or the settings refuse is one line with advice, and the advice works when it is followed."""

import shutil
from pathlib import Path

import pytest

from mlx_aimv2.checkpoint import hub as hub_module
from mlx_aimv2.checkpoint.read import read
from tests.checkpoint.test_hub import MAIN, NAME, PIN, READ, hub, read_each, refusal, released, run  # noqa: F401
from tests.loopback import serve
from tests.small_models import FIXED

LOGIN_PAGE = (200, "text/html", b"<html>sign in</html>")

WRONG_ANSWERS = {
    "login page": (LOGIN_PAGE, "a network login page or a proxy may be in between"),
    "403": ((403, *LOGIN_PAGE[1:]), "accept the terms on the repository's page"),
    "429": ((429, *LOGIN_PAGE[1:]), "too many requests: wait a few minutes"),
    "500": ((500, *LOGIN_PAGE[1:]), "run it again later; HF_HUB_OFFLINE=1 uses what is in the cache"),
    "418": ((418, *LOGIN_PAGE[1:]), "(418)"),
} | {
    f"JSON {number}": ((200, "application/json", body), "")
    for number, body in enumerate([b"[]", b"null", b'"x"', b"{}", b'{"sha": 5, "siblings": 7}', b"[" * 50_000])
}

NO_WAITING = """
import time
time.sleep = lambda seconds: None  # between two tries
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What reading says after each of the wrong answers."""
    names = [f"somebody/model-{number}" for number in range(len(WRONG_ANSWERS))]
    with serve() as server:
        server.answers = dict(zip(names, (answer for answer, _ in WRONG_ANSWERS.values()), strict=True))
        found = read_each(server, tmp_path_factory.mktemp("home"), names, NO_WAITING)
    return dict(zip(WRONG_ANSWERS, found.items(), strict=True))


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_what_another_server_answers_is_one_line_with_advice(answered, kind):
    name, result = answered[kind]
    line = refusal(result)
    assert name in line
    assert WRONG_ANSWERS[kind][1] in line


@pytest.mark.slow
def test_a_cache_filled_by_hf_download_is_used_offline_as_the_message_says(released, tmp_path):  # noqa: F811
    download = f"from huggingface_hub import snapshot_download; snapshot_download({NAME!r})"
    assert run(released, tmp_path / "home", download).returncode == 0
    line = refusal(run(released, tmp_path / "home", READ, NAME, HF_HUB_OFFLINE="1"))
    assert line.endswith("the cache holds main: add --revision main to use it")
    result = run(released, tmp_path / "home", READ, NAME, "main", HF_HUB_OFFLINE="1")
    assert result.stdout.split() == [NAME, MAIN, "0.25", "apple"], result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("below", ["", "snapshots"])
def test_a_repository_in_the_cache_is_read_at_main(released, tmp_path, below):  # noqa: F811
    for revision in ("main", PIN):
        assert run(released, tmp_path / "home", READ, NAME, revision).returncode == 0
    repository = tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}"
    assert read(repository / below).folder == repository / "snapshots" / MAIN
    assert read(repository / below).config["rms_norm_eps"] == 0.25
    shutil.rmtree(repository / "refs")
    with pytest.raises(FileNotFoundError, match="give the folder of one of them") as caught:
        read(repository / below)
    assert PIN in str(caught.value)
    assert read(repository / "snapshots" / PIN).config["rms_norm_eps"] == 1e-5  # the remedy that was named


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_broken_link_in_the_cache_is_named(tmp_path, name):
    folder = Path(shutil.copytree(FIXED, tmp_path / "fixed"))
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=rf"{name} is a link to ../../blobs/abc, which is not there: fetch it"):
        read(folder)


@pytest.mark.slow
def test_with_the_cache_alone_a_broken_hub_is_no_hindrance(released, tmp_path):  # noqa: F811
    assert run(released, tmp_path / "home", READ, NAME).returncode == 0
    released.answers[NAME] = (500, *LOGIN_PAGE[1:])
    assert run(released, tmp_path / "home", READ, NAME, HF_HUB_OFFLINE="1").returncode == 0


def test_a_token_that_cannot_be_sent_is_named(released, tmp_path):  # noqa: F811
    line = refusal(run(released, tmp_path / "home", READ, NAME, HF_TOKEN="hf_schlüssel"))
    assert "HF_TOKEN" in line and "copy it again" in line and "schl" not in line
    assert run(released, tmp_path / "home", READ, NAME, HF_TOKEN="hf_key").returncode == 0


def test_a_home_that_is_a_file_is_named(released, tmp_path):  # noqa: F811
    (tmp_path / "home").touch()
    line = refusal(run(released, tmp_path / "home", READ, NAME))
    assert f"{tmp_path / 'home'} is not a folder" in line and "set HF_HOME to a folder" in line
    assert run(released, tmp_path / "folder", READ, NAME).returncode == 0


def test_no_space_left_says_where_and_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    def full(*_, **__):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("Data processing error") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ConnectionError, match=r"no space left for the Hub's cache .*: free some, or set HF_HOME"):
        hub_module.download(NAME, revision=None, patterns=["config.json"])


@pytest.mark.slow
def test_a_list_of_shards_that_holds_a_pattern_fetches_nothing_more(released, tmp_path):  # noqa: F811
    files = released.repositories[NAME][PIN]
    for pattern in ("*", "model-?.safetensors", "[a-z]*.bin", "notes.txt"):
        files["model.safetensors.index.json"] = f'{{"weight_map": {{"a": "{pattern}"}}}}'.encode()
        released.requests.clear()
        assert "is not a weight file" in refusal(run(released, tmp_path / pattern[0], READ, NAME))
        assert "flax_model.msgpack" not in released.fetched() and "model.safetensors" not in released.fetched()


def test_a_file_outside_the_cache_is_not_used(tmp_path):
    cache = tmp_path / "hub"
    folder = cache / "models--a--b" / "snapshots" / MAIN
    folder.mkdir(parents=True)
    (cache / "models--a--b" / "blobs").mkdir()
    (cache / "models--a--b" / "blobs" / "x").touch()
    (folder / "config.json").symlink_to("../../blobs/x")
    hub_module._check_inside(folder, cache)
    (tmp_path / "escaped").touch()
    (folder / "model.safetensors").symlink_to("../../../../escaped")
    with pytest.raises(OSError, match="leads outside the Hub's cache"):
        hub_module._check_inside(folder, cache)


def test_an_answer_whose_etag_leads_out_of_the_cache_is_not_used(released, tmp_path):  # noqa: F811
    released.etags["model.safetensors"] = "../../../../escaped"
    result = run(released, tmp_path / "home", READ, NAME)
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stderr
