"""`mlx-aimv2 serve` prints an address, answers there alone, and ends within seconds of a signal."""

import http.client
import signal
import socket
import sys
import time
from urllib.parse import urlsplit

import pytest

from mlx_aimv2.cli import main
from tests.image_files import noise
from tests.programs import HANGS, running
from tests.small_encoder import small_encoder

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    for number in range(3):
        noise(folder / "in" / f"{number}.png", number)
    assert main(["embed", str(folder / "in"), "-m", str(small_encoder()), "-o", str(folder / "photos.db")]) == 0
    return folder / "photos.db"


def serving(index, *flags):
    return running(sys.executable, "-m", "mlx_aimv2", "serve", str(index), "--port", "0", "--no-open", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_at_the_printed_address_and_stops_within_seconds(index, number):
    with serving(index) as process:
        address = urlsplit(process.stdout.readline().strip())
        assert address.hostname == "127.0.0.1" and len(address.query) > 30
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=HANGS)
        connection.request("GET", f"/?{address.query}")
        answer = connection.getresponse()
        assert answer.status == 303
        cookie = answer.getheader("set-cookie").partition(";")[0]
        answer.read()
        connection.request("GET", "/about", headers={"Cookie": cookie})
        assert b'"images":3' in connection.getresponse().read()
        slow = socket.create_connection((address.hostname, address.port))
        slow.sendall(b"POST /search HTTP/1.1\r\nHost: x")  # and no more: a client that never ends
        process.send_signal(number)
        sent = time.monotonic()
        assert process.wait(HANGS) == 128 + number
        assert time.monotonic() - sent < 10  # one second and a busy machine
        slow.close()
        connection.close()
        assert "Traceback" not in process.stderr.read()


WRONG = {
    "no index": (["nowhere.db"], "nowhere.db does not exist"),
    "no port": (["INDEX", "--port", "70000"], "--port must be a number from 0 to 65535"),
    "others without a token": (["INDEX", "--host", "0.0.0.0"], "choose the secret they need with --token"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_use_is_one_line(index, kind, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = WRONG[kind]
    assert main(["serve", *(str(index) if word == "INDEX" else word for word in words), "--no-open"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") <= 2


def test_a_port_that_is_taken_is_said(index, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(index), "--port", str(port), "--no-open"]) == 2
    assert f"port {port} of 127.0.0.1 is not available" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(index, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(index), "--no-open"]) == 1
    assert "pip install 'mlx-aimv2[serve]'" in capsys.readouterr().err
