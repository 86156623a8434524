"""Two processes on the loopback interface make the same index as one, and keep what was done when one dies."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_aimv2.cli import main
from mlx_aimv2.embed.distributed import RankLostError, Ranks, my_chunks
from mlx_aimv2.embed.encode import Result
from mlx_aimv2.embed.loader import CHUNK
from mlx_aimv2.index.reader import Embedding, Index
from tests.programs import launched, needs_launch

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"
IMAGES = 3 * CHUNK + 7

# What `mlx-aimv2` does, except that rank 1 dies when rank 0 has taken its first chunk.
DIES = """
import os, signal, sys, time
from mlx_aimv2.cli import main
from mlx_aimv2.embed import distributed, encode, job
job.COMMIT_SECONDS = 1e9  # so that nothing is on disk yet but what is put there on the way out
results = encode.Embedder.__call__
def deadly(*arguments, **options):
    for count, chunk in enumerate(results(*arguments, **options), start=1):
        if os.environ["MLX_RANK"] == "1" and count == 2:
            while not os.path.exists("taken"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
encode.Embedder.__call__ = deadly
gather, rounds = distributed.Ranks.gather, []
def marked(*arguments):
    rounds.append(1)
    if os.environ["MLX_RANK"] == "0" and len(rounds) == 4:  # after plan, digest and the first chunk
        open("taken", "w").close()
    return gather(*arguments)
distributed.Ranks.gather = marked
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of five grids, a broken one and a name that is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    dice = np.random.default_rng(8)
    Path("in").mkdir()
    for number in range(IMAGES):
        low = Image.fromarray(dice.integers(0, 256, (4, 4, 3), np.uint8))
        low.resize((14 * (9 + number % 5), 182), Image.Resampling.BILINEAR).save(
            f"in/{number:03d}.png", compress_level=1
        )
    Path("in/050a.png").write_bytes(b"broken")
    Path(os.fsdecode(b"in/\xff\n.png")).write_bytes(Path("in/000.png").read_bytes())
    return tmp_path


def launch(*command: str, ranks: int = 2) -> tuple[str, str]:
    """Runs a command under mlx.launch: -> (stdout, stderr). The launcher itself always exits with 0."""
    out, err = launched(*command, ranks=ranks)
    return out, "\n".join(line for line in err.splitlines() if "mlx-aimv2: " in line)


def contents(name: str) -> dict[str, tuple[object, ...]]:
    with Index.open(name) as index:
        return {one.path: (one.size, one.mtime_ns, one.sha256, one.vector.tobytes()) for one in index.embeddings()}


@pytest.mark.slow
@needs_launch
@pytest.mark.parametrize(("model", "ranks"), [("native", 2), ("fixed", 3)])
def test_several_ranks_make_the_index_of_a_single_run(folder, model, ranks):
    command = ["embed", "in", "-m", str(REFERENCE / model)]
    assert main([*command, "-o", "one.db"]) == 1
    out, err = launch("-m", "mlx_aimv2", *command, "-o", "two.db", ranks=ranks)
    assert out == f"two.db: {IMAGES + 1} images ({IMAGES + 1} embedded, 1 failed)\n"
    assert err.count("050a.png is not an image") == 1
    assert err.count("\n") == 0
    assert contents("two.db") == contents("one.db")
    with Index.open("one.db") as one, Index.open("two.db") as two:
        assert one.provenance == two.provenance


@pytest.mark.slow
@needs_launch
def test_a_rank_that_dies_ends_the_run_and_what_was_done_is_kept(folder):
    command = ["embed", "in", "-m", str(REFERENCE / "fixed")]
    main([*command, "-o", "one.db"])
    whole = contents("one.db")
    out, err = launch("-c", DIES, *command, "-o", "two.db")
    assert out == ""
    line = next(line for line in err.splitlines() if "rank 0" in line)
    assert "another rank is gone" in line
    partly = contents("two.db")
    assert f"two.db keeps {len(partly)} images; run it again to continue" in line
    assert 0 < len(partly) < len(whole)
    assert partly.items() <= whole.items()
    launch("-m", "mlx_aimv2", *command, "-o", "two.db")
    assert contents("two.db") == whole


@pytest.mark.slow
@needs_launch
def test_a_mistake_is_reported_once(folder):
    _, err = launch("-m", "mlx_aimv2", "embed", "nowhere", "-m", str(REFERENCE / "fixed"), "-o", "two.db")
    assert err == "mlx-aimv2: nowhere does not exist: give images, or folders with images"
    _, err = launch("-m", "mlx_aimv2", "embed", "-", "-m", str(REFERENCE / "fixed"), "-o", "two.db")
    assert "- does not work with mlx.launch" in err
    assert not Path("two.db").exists()


def test_a_single_process_needs_no_engine(monkeypatch):
    monkeypatch.setattr("mlx.core.distributed.init", None)
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.first(lambda: {"a": 1}) == {"a": 1}


def test_being_ended_by_the_launcher_is_a_rank_lost(monkeypatch):
    class Group:
        def size(self):
            return 2

    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setattr("mlx.core.distributed.init", Group)
    before = signal.getsignal(signal.SIGTERM)
    try:
        Ranks()
        with pytest.raises(RankLostError, match="another rank is gone"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_every_chunk_belongs_to_one_rank_and_all_have_as_many_rounds(size, count):
    class Some(Ranks):
        def __init__(self, rank: int) -> None:
            self._rank = rank

        rank = property(lambda self: self._rank)
        size = property(lambda self: size)

    chunks = [[f"{n}"] for n in range(count)]
    shares = [my_chunks(chunks, Some(rank)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    rounds = [chunk for turn in zip(*shares, strict=True) for chunk in turn]
    assert [chunk for chunk in rounds if chunk] == chunks


def test_what_a_rank_hands_over_arrives_as_it_was():
    name = os.fsdecode(b"/a\xff\n.jpg")
    vectors = [np.arange(5, dtype=np.float32), np.ones((2, 3, 5), np.float32), np.empty(0, np.float32)]
    sent = Result(
        [Embedding(name, 7, 1_700_000_000_123_456_789, bytes(range(32)), vector) for vector in vectors],
        [(name, "is broken")],
        [(name, "is small")],
    )
    got = Result.unpacked(sent.packed())
    assert (got.failures, got.notes) == (sent.failures, sent.notes)
    for one, other in zip(sent.embeddings, got.embeddings, strict=True):
        assert (one.path, one.size, one.mtime_ns, one.sha256) == (other.path, other.size, other.mtime_ns, other.sha256)
        np.testing.assert_array_equal(one.vector, other.vector)
