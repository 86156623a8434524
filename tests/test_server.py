"""The server of docs/server.md answers many requests at once, all right, with a level number of threads."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_aimv2.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "server.md"
TASKS = Path("/proc/self/task")

fastapi = pytest.importorskip("fastapi")


@pytest.fixture
def server(tmp_path, monkeypatch, fixed):
    """The page's server, on an index of twelve images made with a small model."""
    from tests.conftest import REFERENCE
    from tests.image_files import noise

    monkeypatch.chdir(tmp_path)
    for number in range(12):
        noise(tmp_path / "in" / f"{number:02d}.png", number)
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "photos.db"]) == 0
    (section,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    code = section.replace('"aimv2-large-8bit"', repr(str(REFERENCE / "fixed")))
    names: dict = {"__name__": "server"}
    exec(compile(code, "server.md", "exec"), names)
    yield names["app"]
    names["index"].close()


def test_the_server_of_the_page_finds_each_image_and_refuses_what_is_none(server):
    from fastapi.testclient import TestClient

    with TestClient(server) as client:
        answer = client.post("/similar", files={"image": Path("in/03.png").read_bytes()})
        assert answer.status_code == 200
        best = answer.json()[0]
        assert Path(best["path"]).name == "03.png" and best["score"] > 0.999
        broken = client.post("/similar", files={"image": b"no image"})
        assert broken.status_code == 422 and "not an image" in broken.json()["detail"]


@pytest.mark.slow
def test_two_hundred_requests_in_eight_threads_are_all_right_and_leave_no_threads(server):
    from fastapi.testclient import TestClient

    files = sorted(Path("in").iterdir())

    def ask(number: int) -> str:
        file = files[number % len(files)]
        answer = client.post("/similar", files={"image": file.read_bytes()}).json()
        return "" if Path(answer[0]["path"]).name == file.name else file.name

    with TestClient(server) as client, ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(ask, range(100)))
        before = len(list(TASKS.iterdir())) if TASKS.is_dir() else 0
        assert not any(pool.map(ask, range(100, 200)))
        after = len(list(TASKS.iterdir())) if TASKS.is_dir() else 0
    assert after <= before + 8
