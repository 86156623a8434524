"""Who may use the server: those who know the token, by its own name, from its own page."""

import asyncio
import re

import pytest

from mlx_aimv2.serve import access
from tests.serve.conftest import PORT, TOKEN


def test_without_the_token_there_is_nothing(stranger):
    for path in ("/", "/about", "/docs", "/openapi.json", "/thumbnail/0", "/page/main.js", "/v1/models", "/elsewhere"):
        answer = stranger.get(path)
        assert answer.status_code == 401, path
        assert "?token=" in answer.text


def test_the_printed_address_gives_a_cookie_and_an_address_without_the_token(stranger):
    answer = stranger.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and f"mlx-aimv2-{PORT}=" in cookie
    assert stranger.get("/about").status_code == 200
    assert "mlx-aimv2" in stranger.get("/").text


@pytest.mark.parametrize("token", ["", "another", f"{TOKEN}x", TOKEN[:-1], "%00", "é"])
def test_another_token_opens_nothing(stranger, token):
    assert stranger.get(f"/?token={token}").status_code == 401
    assert stranger.get("/about", headers={"Authorization": f"Bearer {token}".encode()}).status_code == 401
    assert stranger.get("/about", headers={"Cookie": f"mlx-aimv2-{PORT}={token}".encode()}).status_code == 401


REFUSED = {
    "a name that somebody else points here": {"host": f"evil.example:{PORT}"},
    "another port": {"host": "127.0.0.1:80"},
    "no port": {"host": "localhost"},
    "another page": {"origin": "http://evil.example"},
    "a page of another port": {"origin": "http://127.0.0.1:9999"},
    "a page in a sandbox": {"origin": "null"},
    "an image in a page of another port": {"sec-fetch-site": "same-site"},
    "a link elsewhere": {"sec-fetch-site": "cross-site"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_from_elsewhere_nobody_gets_in_even_with_the_token(client, kind):
    for path in ("/about", "/thumbnail/0", f"/?token={TOKEN}"):
        answer = client.get(path, headers=REFUSED[kind])
        assert answer.status_code == 403, path
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
def test_by_each_of_its_names_from_its_own_page_all_get_in(client, host):
    headers = {"host": f"{host}:{PORT}", "origin": f"http://{host}:{PORT}", "sec-fetch-site": "same-origin"}
    assert client.post("/search", json={"query": [{"id": 0}]}, headers=headers).status_code == 200


def test_every_answer_lets_a_page_load_from_this_server_alone(client, stranger):
    for answer in (client.get("/"), client.get("/elsewhere"), client.get("/about", headers={"host": "x"})):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_names_no_address_and_runs_nothing_inline():
    from mlx_aimv2.serve.app import PAGE

    files = list(PAGE.iterdir())
    assert sum(file.stat().st_size for file in files) < 100_000
    for file in files:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//\w+\.\w", text), file.name
        assert file.suffix != ".html" or not re.search(r"<script(?![^>]*src)|\son\w+=|\sstyle=", text), file.name


def test_a_request_that_is_too_large_is_refused(client, monkeypatch):
    monkeypatch.setattr(access, "MAX_BODY", 1000)
    assert client.post("/search", content=b"[" * 1001).status_code == 413
    answer = client.post("/search", content=(b"x" * 100 for _ in range(11)))  # of no length that it says
    assert answer.status_code == 413
    assert client.post("/search", content=b"[" * 1000).status_code == 400


def exchange(app, messages, **headers):
    """What an ASGI application answers to a request whose body comes as `messages`, then no more."""
    sent = []

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    given = {"host": f"127.0.0.1:{PORT}", "authorization": f"Bearer {TOKEN}", **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


async def reader(scope, receive, send):
    """An application that reads all of a request."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_request_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(access, "MAX_SECONDS", 0.05)
    guard = access.Guard(reader, token=TOKEN, hosts=["127.0.0.1"], port=PORT)
    assert exchange(guard, [{"type": "http.request", "body": b"x", "more_body": True}]) == 408
    assert exchange(guard, [{"type": "http.request", "body": b"x"}]) == 200
    assert guard.running == 0


def test_more_requests_than_it_answers_at_once_are_asked_to_come_again(client, monkeypatch):
    monkeypatch.setattr(access, "MAX_AT_ONCE", 0)
    answer = client.get("/about")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_a_server_for_others_has_any_name_and_still_its_own_page_alone():
    guard = access.Guard(reader, token=TOKEN, hosts=None, port=PORT)
    body = {"type": "http.request", "body": b""}
    assert exchange(guard, [body], host="mac.local:1") == 200
    assert exchange(guard, [body], host="mac.local:1", origin="http://mac.local:1") == 200
    assert exchange(guard, [body], host="mac.local:1", origin="http://other.local") == 403
    assert exchange(guard, [body], host="mac.local:1", authorization="Bearer other") == 401
