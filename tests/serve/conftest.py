"""A server of small images whose pair knows three colours, called without a network."""

import base64
import io

import pytest
from PIL import Image

from mlx_aimv2.cli import main
from tests.small_lit import COLOURS, colour_lit, write

pytest.importorskip("fastapi")

PORT = 8224
TOKEN = "the-token"


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def picture(colour, side=42):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """An index of twelve images in two folders, four of each colour, darker and darker; and its pair."""
    folder = tmp_path_factory.mktemp("serve")
    pair = write(folder / "pair", model=colour_lit())
    for number in range(12):
        level = 255 - 30 * (number // 3)
        colour = tuple(level if axis == number % 3 else 0 for axis in range(3))
        file = folder / ("one" if number < 6 else "two") / f"{number:02d}-{COLOURS[number % 3]}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture(colour))
    assert main(["embed", str(folder / "one"), str(folder / "two"), "-m", str(pair), "-o", str(folder / "all.db")]) == 0
    return folder


@pytest.fixture
def served(photographs, tmp_path):
    """The service of a copy of the index, so that what is written beside it is this test's."""
    from mlx_aimv2.embed.encode import Settings
    from mlx_aimv2.embed.query import embedder_of
    from mlx_aimv2.index import Index
    from mlx_aimv2.serve.app import Service
    from mlx_aimv2.serve.gallery import Gallery

    index_file = tmp_path / "photos.db"
    index_file.write_bytes((photographs / "all.db").read_bytes())
    with Index.open(index_file) as index:
        service = Service(embedder_of(index, Settings()), Gallery(index))
        yield service
        service.engine.stop()


@pytest.fixture
def stranger(served):
    """A client of the server that does not know the token."""
    from fastapi.testclient import TestClient

    from mlx_aimv2.serve.access import Guard
    from mlx_aimv2.serve.app import create_app

    guard = Guard(create_app(served), token=TOKEN, hosts=["127.0.0.1", "localhost", "[::1]"], port=PORT)
    address = f"http://127.0.0.1:{PORT}"
    with TestClient(guard, base_url=address, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture
def client(stranger):
    """A client that knows it."""
    stranger.headers["Authorization"] = f"Bearer {TOKEN}"
    return stranger
