"""Hostile requests get no 500 and nothing that is not in the index; many at once are all answered or asked to wait."""

import http.client
import json
import random
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.programs import HANGS, running
from tests.serve.conftest import PORT, TOKEN, data_url, picture

PATHS = (
    *("/", "/about", "/images", "/thumbnail/0", "/view/0", "/patches/0", "/atlas", "/examples", "/v1/models"),
    *("/page/main.js", "/docs", "/openapi.json", "/etc/passwd", "/page/../app.py", "/page/%2e%2e%2fapp.py"),
    *("/thumbnail/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/thumbnail/-1", "/thumbnail/1e9", "/view/" + "9" * 400, "//x"),
)
POSTS = ("/v1/embeddings", "/search", "/classify", "/similarity", "/examples", "/examples/undo", "/duplicates/list")
VALUES = (
    *(None, "", "x" * 20_000, "\ud800", "\0", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "../../x"),
    *(-1, 10**30, 1e308, float("nan"), float("inf"), True, [], {}, [[[[]]]], {"a": {"b": {}}}, [None], ["x"] * 300),
    *("data:image/png;base64,", "data:image/png;base64,AAAA", "data:image/svg+xml;base64,PHN2Zy8+", "data:,x"),
)
FIELDS = {
    "/v1/embeddings": ("input", "model", "encoding_format", "dimensions"),
    "/search": ("query", "k", "min_score", "folder", "after", "before", "path"),
    "/classify": ("labels", "id", "image"),
    "/similarity": ("id", "patch", "others"),
    "/examples": ("ids", "label"),
}
PARTS = ("text", "id", "image", "weight", "url", "type", "image_url")
HEADERS = (
    *({"host": "evil.example"}, {"host": f"127.0.0.1.evil.example:{PORT}"}, {"origin": "http://evil.example"}),
    *(
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"authorization": "Bearer x"},
        {"authorization": "Basic x"},
    ),
    *({"authorization": ""}, {"cookie": 'a=b; c="d'}, {"content-type": "text/plain"}, {"content-length": "x"}),
    *({"content-type": "multipart/form-data"}, {"range": "bytes=0-1"}, {"x": "y" * 4000}),
)


def body(rng, path):
    """A body for a route: raw bytes, deep or broken JSON, or the route's fields with values that they cannot have."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'"\\ud800"', b"{", b"null", b"[1e999]"])
    given = {name: rng.choice(VALUES) for name in FIELDS.get(path, ()) if rng.random() < 0.7}
    if path == "/search" and kind > 3:
        given["query"] = [{rng.choice(PARTS): rng.choice(VALUES) for _ in range(3)} for _ in range(rng.randrange(4))]
    if path == "/v1/embeddings" and kind > 3:
        given["input"] = [{rng.choice(PARTS): rng.choice(VALUES)}, rng.choice(VALUES)]
    return json.dumps(given).encode("utf-8", "surrogatepass")


@pytest.mark.slow
def test_six_hundred_hostile_requests_get_no_500_and_nothing_from_the_disk(client, served):
    rng = random.Random(600)
    codes = []
    for number in range(600):
        headers = rng.choice(HEADERS) if number % 3 == 0 else {}
        if number % 2:
            path = rng.choice(POSTS)
            given = body(rng, path)
            answer = client.post(path, content=given, headers={"content-type": "application/json", **headers})
        else:
            path, given = rng.choice(PATHS), b""
            answer = client.request(rng.choice(["GET", "HEAD", "PUT", "DELETE", "OPTIONS"]), path, headers=headers)
        codes.append(answer.status_code)
        assert answer.status_code < 500 or answer.status_code == 503, (path, given[:200], answer.text[:300])
        assert b"root:" not in answer.content
    assert {200, 400, 401, 403, 404, 405} <= set(codes)
    assert client.post("/search", json={"query": [{"id": 0}]}).status_code == 200


@pytest.mark.slow
def test_a_bomb_of_an_image_is_refused(client):
    from tests.fuzz.learning import bomb

    rng = random.Random(5)
    for _ in range(10):
        answer = client.post("/v1/embeddings", json={"input": data_url(bomb(rng))})
        assert answer.status_code == 400, answer.text[:200]


@pytest.mark.slow
def test_two_thousand_requests_of_sixteen_clients_are_all_answered_or_asked_to_wait(photographs):
    command = ["-m", "mlx_aimv2", "serve", str(photographs / "all.db"), "--port", "0", "--token", TOKEN, "--no-open"]
    times, codes, faults = [], [], []
    requests = [
        ("/search", {"query": [{"text": "green"}], "k": 5}),
        ("/v1/embeddings", {"input": ["red", data_url(picture("blue"))]}),
        ("/classify", {"labels": ["red", "blue"], "id": 3}),
        ("/similarity", {"id": 1, "patch": [0, 0], "others": [2, 3]}),
        ("/examples", None),
    ]

    def ask(address, count):
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=HANGS)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        for number in range(count):
            path, content = requests[number % len(requests)]
            start = time.perf_counter()
            given = json.dumps(content) if content is not None else None
            connection.request("GET" if given is None else "POST", path, given, headers)
            answer = connection.getresponse()
            found = answer.read()
            times.append(time.perf_counter() - start)
            codes.append(answer.status)
            if answer.status == 200 and path == "/search" and b"green.png" not in found:
                faults.append(found)
        connection.close()

    with running(sys.executable, *command) as process:
        address = urlsplit(process.stdout.readline().strip())
        ask(address, 10)
        before = memory_of(process.pid)
        threads = [threading.Thread(target=ask, args=[address, 125]) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = memory_of(process.pid)
    assert len(codes) == 2010 and set(codes) <= {200, 503} and codes.count(200) > 1000 and not faults
    assert after < before + 300, f"{before} -> {after} MB"
    times.sort()
    print(
        f"p50 {1e3 * times[1005]:.0f} ms, p95 {1e3 * times[1910]:.0f} ms, {codes.count(503)} asked to wait, {after} MB"
    )


def memory_of(pid):
    """Resident memory in MB; 0 where the system does not tell it so."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))
    except OSError:
        return 0
