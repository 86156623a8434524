"""The server of docs/server.md answers many requests at once, all right, with a level number of threads."""

import random
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
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "similar.db"]) == 0
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


def uploads(folder: Path):
    """570 hostile requests, as the keywords of `client.post`: images of every format broken or cut, and no images."""
    from tests.fuzz.images import broken_image, make_images
    from tests.fuzz.learning import bomb
    from tests.fuzz.mutate import broken_bytes

    make_images(folder)
    rng = random.Random(570)
    jpeg = next(file for file in sorted(folder.iterdir()) if file.name.endswith("JPEG-RGB")).read_bytes()
    files = [broken_image(rng, folder) for _ in range(400)]
    files += [jpeg[: len(jpeg) * share // 100] for share in range(100)]
    files += [bomb(rng) for _ in range(20)]
    files += [
        b"",
        b"\0",
        b"/etc/passwd",
        b"http://127.0.0.1/x.png",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"[" * 10_000,
    ]
    names = ("x" * 10_000, "../../../etc/passwd", "a\r\nb.png", "caf\u00e9.png", "", "x.eps", "/dev/zero", "\u202e.png")
    yield from ({"files": {"image": content}} for content in files)
    yield from ({"files": {"image": (name, jpeg, kind)}} for name in names for kind in ("image/png", "text/html", "x"))
    yield from ({"data": {"image": text}} for text in ("/etc/passwd", "in/03.png", "x" * 100_000, ""))  # no upload
    whole = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + jpeg + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    yield from ({"content": broken_bytes(whole, rng), "headers": headers} for _ in range(15))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # what is unusual about an image that is used all the same
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # the form's
def test_no_hostile_upload_is_the_servers_fault_and_none_is_read_from_its_disk(server, tmp_path):
    from fastapi.testclient import TestClient

    asked = list(uploads(tmp_path / "hostile"))
    assert len(asked) == 570
    with TestClient(server, raise_server_exceptions=False) as client:
        codes = [client.post("/similar", **one).status_code for one in asked]
        assert client.post("/similar", files={"image": Path("in/03.png").read_bytes()}).status_code == 200
    assert set(codes) <= {200, 400, 422}, sorted(set(codes))
    assert {code for one, code in zip(asked, codes, strict=True) if "data" in one} == {422}
