"""A Hub on the loopback interface some of whose answers are broken, and a download from it."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.fuzz.mutate import broken_bytes, broken_json
from tests.loopback import Hub, _Handler

NAME = "somebody/model"
COMMIT = "c" * 40


class _Broken(_Handler):
    """Answers as the Hub does until it is a broken answer's turn."""

    state: Hub
    dice: random.Random
    whole: float
    """The share of answers that are left whole."""

    def _read(self) -> None:
        from tests.fuzz.kinds import ANSWERS

        if self.dice.random() >= self.whole and self.dice.random() < 0.6:
            status, kind, body = self.dice.choice(ANSWERS)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if self.dice.random() < 0.3:
                self.send_header("ETag", self.dice.choice(('"../../../escaped"', '"x"', "", '"/etc/passwd"')))
                self.send_header("X-Repo-Commit", self.dice.choice((COMMIT, "../../..", "", "x")))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            return
        super()._read()

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.dice.random() >= self.whole:
            content = broken_json(content, self.dice)
        super()._json(content, status, headers)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword in ("ETag", "X-Repo-Commit", "Content-Length", "Content-Range") and self.dice.random() > self.whole:
            value = self.dice.choice(("", "x", '"../../../escaped"', "../..", "-1", "10", "9" * 30, f'"{"a" * 400}"'))
            self.close_connection = True  # else the client would wait for the rest until its own limit, ten seconds
        super().send_header(keyword, value)

    def log_error(self, *arguments: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError, RecursionError):  # a client that went away, a text with half a surrogate
            self.close_connection = True


def set_environment() -> None:
    """Before huggingface_hub is imported: it asks this machine alone. The address is known when the server stands."""
    state = Hub()

    class Handler(_Broken):
        pass

    Handler.state, Handler.dice, Handler.whole = state, random.Random(0), 1.0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    os.environ |= state.environment(Path("/nonexistent"))
    time.sleep = lambda seconds: None  # huggingface_hub waits longer and longer between its tries, as it should
    _running.append(Handler)


_running: list[type[_Broken]] = []


def downloads_from_a_broken_hub(dice: random.Random, checkpoint: Path, place: Path) -> Callable[[], object]:
    """What to call to fetch a checkpoint from it, with a cache of its own."""
    from huggingface_hub import constants

    from mlx_aimv2.checkpoint import read

    handler = _running[0]
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    if dice.random() < 0.3:
        name = dice.choice(sorted(files))
        files[name] = broken_bytes(files[name], dice)
    if dice.random() < 0.3:
        shards = dice.choice(("*", "../x", "a/b.safetensors", "model.safetensors", "model-[1].safetensors", ""))
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shards}}).encode()
    handler.state.repositories = {NAME: {COMMIT: files}}
    handler.dice, handler.whole = random.Random(dice.random()), dice.choice((1.0, 0.95, 0.8, 0.5))
    constants.HF_HUB_CACHE = str(place / "hub")

    def call() -> None:
        found = read.read(NAME)
        cache = Path(os.path.realpath(place / "hub"))
        if outside := [file.name for file in found.folder.iterdir() if cache not in file.resolve().parents]:
            raise AssertionError(f"used from outside the cache: {outside}")

    return call
