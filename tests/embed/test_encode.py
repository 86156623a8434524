"""Images become the embeddings that the model gives, in batches of one grid."""

import hashlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import load
from mlx_aimv2.embed.encode import Pooling, embed, embed_chunks
from mlx_aimv2.embed.loader import CHUNK, Decoder, split_into_chunks
from tests.image_files import image

pytestmark = pytest.mark.rounding

REFERENCE = Path(__file__).parents[1] / "golden" / "reference"


class Noted:
    """A pooling that notes the shapes it is given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, model, pixels):
        self.shapes.append(tuple(pixels.shape))
        return pixels.mean(axis=(1, 2))


def test_an_embedding_is_what_the_model_gives_with_the_files_stamp(folder, fixed):
    model, processor = fixed
    results = list(embed([folder], model, processor))
    assert [Path(one.path).name for one in results] == [f"{n}.png" for n in range(7)]
    for one in results:
        wanted = np.array(model.encode_image(processor([one.path]))[0])
        np.testing.assert_allclose(one.vector, wanted, rtol=1e-4, atol=1e-4)
        about = Path(one.path).stat()
        assert (one.size, one.mtime_ns) == (about.st_size, about.st_mtime_ns)
        assert one.sha256 == hashlib.sha256(Path(one.path).read_bytes()).digest()


def test_one_bad_image_raises_or_is_passed_on(folder, fixed):
    (folder / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png is not an image"):
        list(embed([folder], *fixed))
    failures = []
    results = list(embed([folder], *fixed, on_failure=lambda path, reason: failures.append((Path(path).name, reason))))
    assert len(results) == 6
    assert failures == [("3.png", "is not an image in a format that Pillow reads")]


def test_a_name_that_is_not_there_fails_too(folder, fixed):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        list(embed([folder, "nowhere"], *fixed))


def test_numbers_that_are_not_finite_fail_by_name(folder):
    model, processor = load(REFERENCE / "fixed")
    model.norm.weight = mx.full(model.norm.weight.shape, float("nan"))
    with pytest.raises(ValueError, match=r"0\.png gave values that are not finite"):
        list(embed([folder], model, processor))


def test_stopping_early_stops_the_threads(folder, fixed):
    results = embed([folder], *fixed)
    next(results)
    results.close()


def test_a_batch_holds_so_many_tokens(folder, fixed, monkeypatch):
    monkeypatch.setattr("mlx_aimv2.embed.loader.BATCH_TOKENS", 3 * fixed[0].config.num_patches + 1)
    noted = Noted()
    chunks = split_into_chunks([str(folder / f"{n}.png") for n in range(7)])
    list(embed_chunks(chunks, Decoder(fixed[1]), fixed[0], noted))
    assert [shape[0] for shape in noted.shapes] == [2, 2, 2, 1]  # a power of two


def test_images_of_one_grid_share_a_batch_and_none_is_padded(tmp_path, native):
    sizes = [(140, 168), (168, 140), (140, 168), (150, 170), (14 * 70, 14 * 50), (168, 140), (14 * 70, 14 * 50)]
    files = [str(image(tmp_path / f"{n}.png", size, n)) for n, size in enumerate(sizes)]
    noted = Noted()
    (result,) = embed_chunks([files], Decoder(native[1]), native[0], noted)
    assert [one.path for one in result.embeddings] == files
    # Without its remainder 150 x 170 is 140 x 168; two images of 3,500 tokens are too many for a batch.
    assert sorted(noted.shapes) == [(1, 700, 980, 3), (1, 700, 980, 3), (2, 140, 168, 3), (3, 168, 140, 3)]


def test_a_batch_never_crosses_a_chunk(tmp_path, fixed):
    files = [str(image(tmp_path / f"{n:03d}.png", (42, 42), n)) for n in range(CHUNK + 3)]
    noted = Noted()
    chunks = list(embed_chunks(split_into_chunks(files), Decoder(fixed[1]), fixed[0], noted))
    assert [len(chunk.embeddings) for chunk in chunks] == [CHUNK, 3]
    assert [shape[0] for shape in noted.shapes] == [CHUNK, 3]


def test_empty_chunks_stay_in_their_places(tmp_path, fixed):
    file = str(image(tmp_path / "a.png", (42, 42)))
    chunks = list(embed_chunks([[], [file], []], Decoder(fixed[1]), fixed[0], Pooling.of(fixed[0])))
    assert [len(chunk.embeddings) for chunk in chunks] == [0, 1, 0]


def test_small_native_images_give_a_warning(tmp_path, native):
    image(tmp_path / "a.png", (14 * 8, 14 * 13))
    with pytest.warns(UserWarning, match=r"a\.png has 13x8 patches; the checkpoint was trained on 112"):
        list(embed([tmp_path], *native))
    image(tmp_path / "a.png", (14 * 8, 14 * 14))
    list(embed([tmp_path], *native))


def test_exif_orientation_is_honoured(tmp_path, native):
    upright = Image.open(image(tmp_path / "a.png", (14 * 12, 14 * 10)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held with its right side down
    upright.rotate(90, expand=True).save(tmp_path / "b.png", exif=exif)
    one, other = embed([tmp_path], *native)
    np.testing.assert_array_equal(one.vector, other.vector)
