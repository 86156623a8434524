"""What every test starts from: exact float32 arithmetic and no network; and a CPU of three cores for those that ask."""

import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest

# Before the first import of mlx: TensorFloat32 would cost five digits on GPUs that have it.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# Before that of huggingface_hub: what the user has in his cache, and his token, are none of the tests'.
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[name]
_hub_home = tempfile.TemporaryDirectory(prefix="tests-hub-")
os.environ |= {"HF_HOME": _hub_home.name, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Keeps what the tests cache apart from the user's own."""
    os.environ["MLX_AIMV2_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def sigint_is_heard():
    """A run in a shell's background inherits that SIGINT is ignored, and the programs that tests start would too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def three_cores(monkeypatch):
    """A function that makes MLX's device an x86 CPU of three cores, and takes what else to set in `x86`."""
    import mlx.core as mx

    from mlx_aimv2.backend import x86

    own = threading.local()

    def streams():
        """A stream for each of the three cores in each thread, as on such a machine."""
        if not hasattr(own, "streams"):
            own.streams = [mx.new_stream(mx.cpu) for _ in range(3)]
        return own.streams

    def become(*, blas_threads, **settings):
        settings |= {"on_x86_cpu": lambda: True, "cpu_count": lambda: 3, "blas_threads": lambda: blas_threads}
        for name, value in (settings | {"streams": streams}).items():
            monkeypatch.setattr(x86, name, value)

    yield become
    monkeypatch.undo()


REFERENCE = Path(__file__).parent / "golden" / "reference"


@pytest.fixture(scope="session")
def fixed():
    from mlx_aimv2 import load

    return load(REFERENCE / "fixed")


@pytest.fixture(scope="session")
def native():
    from mlx_aimv2 import load

    return load(REFERENCE / "native")


@pytest.fixture(scope="session")
def lit():
    from mlx_aimv2 import load

    return load(REFERENCE / "lit")


@pytest.fixture
def folder(tmp_path):
    """Seven images of several sizes."""
    from tests.image_files import image

    for number in range(7):
        image(tmp_path / "in" / f"{number}.png", (50 + 3 * number, 71 - 4 * number), number)
    return tmp_path / "in"


@pytest.fixture
def embed_command(tmp_path, monkeypatch, capsys):
    """Runs `mlx-aimv2 embed` beside the folder: arguments -> (exit code, stdout, stderr)."""
    from mlx_aimv2.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, model: str | None = "fixed") -> tuple[int, str, str]:
        chosen = [] if model is None else ["-m", str(REFERENCE / model)]
        code = main(["embed", *arguments, "-o", "photos.db", *chosen])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def search(capsys):
    """Runs `mlx-aimv2 search photos.db …`: arguments -> (exit code, stdout, stderr)."""

    from mlx_aimv2.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["search", "photos.db", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def photo_index(tmp_path, monkeypatch):
    """An index of five images, one of them with a hostile name."""
    from mlx_aimv2.cli import main
    from tests.image_files import noise

    monkeypatch.chdir(tmp_path)
    for number in range(4):
        noise(tmp_path / "in" / f"{number}.png", number)
    noise(tmp_path / "in" / "<img src=x onerror=alert(1)>.jpg", 9)
    assert main(["embed", "in", "-m", str(REFERENCE / "fixed"), "-o", "photos.db"]) == 0
    return tmp_path


@pytest.fixture
def golden_lit():
    """The small LiT model of the golden values, and its ids."""
    from pathlib import Path

    import mlx.core as mx
    import numpy as np

    from mlx_aimv2 import load

    folder = Path(__file__).parent / "golden" / "reference" / "lit"
    with np.load(folder / "expected.npz") as expected:
        ids = mx.array(expected["input_ids"])
    mx.eval(ids)
    return load(folder)[0], ids


@pytest.fixture(scope="session")
def lit_folder(tmp_path_factory):
    """A small LiT model with its tokenizer files, in Apple's layout."""
    from tests.small_lit import write

    return write(tmp_path_factory.mktemp("lit"))


@pytest.fixture(scope="session")
def lit_pair(lit_folder):
    """That model and its processor."""
    from mlx_aimv2 import load

    return load(lit_folder)


@pytest.fixture(scope="session")
def noise_images(tmp_path_factory) -> list[str]:
    """Five small noisy images."""
    import numpy as np
    from PIL import Image

    place, dice = tmp_path_factory.mktemp("images"), np.random.default_rng(11)
    files = [place / f"{n}.png" for n in range(5)]
    for file in files:
        Image.fromarray(dice.integers(0, 256, (47, 43, 3), np.uint8)).save(file)
    return [str(file) for file in files]
