"""A JPEG decoded at the scale it is needed at gives the same image to a hair, in a fraction of time and memory."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_aimv2 import bundled, load
from mlx_aimv2.cli import main
from mlx_aimv2.embed import embed
from mlx_aimv2.embed.loader import Budget, Decoder
from mlx_aimv2.images import Policy, open_image, to_rgb
from mlx_aimv2.images.preprocessing import Preprocessing, published
from mlx_aimv2.images.processor import Aimv2Processor
from mlx_aimv2.index.reader import Index

FAST = Policy(decode="fast")
EMOJI = bundled.emoji_checkpoint()


def photograph(width: int, height: int, orientation: int = 1, **options: object) -> bytes:
    tag = Image.Exif()
    tag[0x0112] = orientation
    stream = io.BytesIO()
    image = Image.open(bundled.photographs()[0]).resize((width, height), Image.Resampling.BICUBIC)
    image.save(stream, "JPEG", exif=tag, quality=92, **options)
    return stream.getvalue()


def apart(processor: Aimv2Processor, data: bytes, max_patches: int | None = None) -> np.ndarray:
    """Grey levels between exact and fast decoding."""
    both = [
        processor.levels(open_image(data, policy=Policy(decode=decode)), max_patches=max_patches)
        for decode in ("exact", "fast")
    ]
    return np.abs(both[0].astype(int) - both[1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1013, 757), (757, 1013), (896, 672)])
def test_fast_decoding_gives_the_same_image_to_a_level_or_two(size, orientation):
    differences = apart(Aimv2Processor(published(56)), photograph(*size, orientation))
    assert differences.mean() < 1.0
    assert np.percentile(differences, 99) <= 8


def test_the_rim_that_a_scale_adds_is_not_stretched_over_the_image():
    """803 is 100.375 blocks of 8: the last column that libjpeg gives is part of none of the image's pixels."""
    processor = Aimv2Processor(published(42))
    ramp = np.tile(np.linspace(0, 255, 803), (807, 1)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(ramp).convert("RGB").save(stream, "JPEG", quality=98)
    assert apart(processor, stream.getvalue()).mean() < 0.5


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [
        ((1024, 768), 32, 8),  # 768 / 8 is three times 32
        ((1024, 768), 33, 4),
        ((1024, 768), 65, 2),
        ((1024, 768), 129, 1),
        ((768, 1024), 32, 8),
    ],
)
def test_the_scale_is_the_smallest_that_keeps_three_times_the_target(size, target, scale):
    opened = open_image(photograph(*size), policy=FAST)
    wanted = (target * size[0] // min(size), target * size[1] // min(size))
    assert opened.scale(wanted) == scale
    image, _ = opened.rgb(wanted)
    assert image.size == (size[0] // scale, size[1] // scale)


def test_exact_decoding_and_other_formats_are_never_scaled():
    data = photograph(1024, 768)
    assert open_image(data).scale((40, 30)) == 1
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).save(stream, "PNG")
    assert open_image(stream.getvalue(), policy=FAST).scale((40, 30)) == 1
    assert open_image(data, policy=FAST).rgb()[0].size == (1024, 768)  # a native checkpoint needs every pixel


def test_the_processor_decodes_exactly_unless_it_is_asked(tmp_path):
    (tmp_path / "a.jpg").write_bytes(photograph(1024, 768))
    processor = Aimv2Processor(published(30))
    exact = processor(tmp_path / "a.jpg")
    assert mx.array_equal(exact, processor(tmp_path / "a.jpg", decode="exact"))
    assert mx.array_equal(exact, processor(to_rgb(tmp_path / "a.jpg")))
    assert not mx.array_equal(exact, processor(tmp_path / "a.jpg", decode="fast"))


def test_a_native_image_that_is_scaled_down_is_decoded_fast():
    processor = Aimv2Processor(published(None))
    data = photograph(1400, 1050)
    opened = open_image(data, policy=FAST)
    assert opened.scale((175, 131)) == 2
    assert apart(processor, data, max_patches=117).mean() < 1.0


def test_features_of_fast_decoding_are_those_of_exact():
    model, processor = load(str(EMOJI))
    cosines = []
    for path in bundled.photographs():
        image = Image.open(path)
        stream = io.BytesIO()
        image.resize((image.width * 3, image.height * 3), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        levels = [
            processor.levels(open_image(stream.getvalue(), policy=Policy(decode=decode)))
            for decode in ("exact", "fast")
        ]
        one, other = np.array(model.encode_image(processor.normalised(mx.array(np.stack(levels))), normalize=True))
        cosines.append(float(one @ other))
    assert np.mean(cosines) >= 0.9999
    assert min(cosines) >= 0.999


@pytest.mark.parametrize(
    "steps",
    [
        published(42),
        Preprocessing(resize=42, crop=(42, 42), rescale_factor=None, image_mean=None, image_std=None),
        Preprocessing(resize=42, crop=(42, 42), rescale_factor=1 / 127.5, image_mean=(1, 1, 1), image_std=(1, 1, 1)),
        Preprocessing(resize=42, crop=(42, 42), image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)),
    ],
)
def test_levels_normalised_on_the_device_are_the_processors_pixels(steps):
    processor = Aimv2Processor(steps)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (42, 42, 3), np.uint8))
    pixels = np.array(processor.normalised(mx.array(processor.levels(open_image(image)))[None]))
    assert np.abs(pixels[0] - processor.pixels(image)).max() <= 1e-6 * max(1.0, np.abs(pixels).max())


def test_embed_decodes_fast_and_says_so_and_an_index_made_fast_is_asked_exactly(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for number in range(3):
        image = Image.open(bundled.photographs()[number])
        image.resize((900, 700)).save(f"in/{number}.jpg", quality=92)
    model = ["-m", str(EMOJI)]
    assert main(["embed", "in", *model, "-o", "fast.db"]) == 0
    assert main(["embed", "in", *model, "-o", "exact.db", "--decode", "exact"]) == 0
    vectors = []
    for name in ("fast", "exact"):
        with Index.open(Path(f"{name}.db")) as index:
            assert index.provenance["decode"] == name
            vectors.append(np.array([one.vector for one in index.embeddings()], np.float64))
    assert not np.array_equal(*vectors)
    capsys.readouterr()
    Image.open("in/1.jpg").save("query.jpg", quality=100)
    assert main(["search", "fast.db", "query.jpg", "--decode", "exact", "-k", "1"]) == 0
    out, err = capsys.readouterr()
    assert "1.jpg" in out and not err
    assert main(["embed", "in", *model, "-o", "fast.db", "--decode", "exact"]) == 0
    assert not capsys.readouterr().err


def test_embed_of_the_library_takes_the_same_settings(tmp_path):
    (tmp_path / "a.jpg").write_bytes(photograph(900, 700))
    model, processor = load(str(EMOJI))
    fast, exact = (next(embed([tmp_path], model, processor, decode=decode)).vector for decode in ("fast", "exact"))
    assert np.array_equal(fast, next(embed([tmp_path], model, processor)).vector)
    assert not np.array_equal(fast, exact)
    with pytest.raises(ValueError, match="more than 1,000"):
        list(embed([tmp_path], model, processor, max_pixels=1000))


# Memory


def test_room_is_given_to_as_many_as_fit_and_to_a_large_one_alone():
    budget, inside, most = Budget(10), [], []
    lock = threading.Lock()

    def work(size: int) -> None:
        with budget.take(size):
            with lock:
                inside.append(size)
                most.append(list(inside))
            threading.Event().wait(0.002)
            with lock:
                inside.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in [3, 4, 25, 5, 1, 9, 25, 2] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(sum(sizes) <= 10 or len(sizes) == 1 for sizes in most)
    assert len(most) == 32 and budget.taken == 0


def test_what_is_decoded_at_one_time_is_bounded(tmp_path, monkeypatch):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(photograph(900 + number, 700))
    decoder = Decoder(Aimv2Processor(published(42)))
    decoder.decoding = Budget(3_000_000)  # one image decoded exactly
    inside, most, lock = [], [], threading.Lock()
    levels = decoder.processor.levels

    def counted(opened, **keywords):
        with lock:
            inside.append(1)
            most.append(len(inside))
        try:
            return levels(opened, **keywords)
        finally:
            with lock:
                inside.pop()

    monkeypatch.setattr(decoder.processor, "levels", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoder, [str(tmp_path / f"{number}.jpg") for number in range(8)]))
    assert all(one.levels is not None for one in found)
    assert max(most) == 1


def test_what_decoding_takes_is_known_before():
    data = photograph(1024, 768)
    assert open_image(data).decoding_bytes((40, 30)) == 4 * 1024 * 768
    assert open_image(data, policy=FAST).decoding_bytes((40, 30)) == 4 * 128 * 96
    progressive = open_image(photograph(1024, 768, progressive=True), policy=FAST)
    assert progressive.decoding_bytes((40, 30)) == 4 * 128 * 96 + 6 * 1024 * 768
    webp = io.BytesIO()
    Image.new("RGB", (1024, 768)).save(webp, "WEBP")
    assert open_image(webp.getvalue()).decoding_bytes() == 16 * 1024 * 768  # its decoder keeps four copies


@pytest.mark.parametrize(("environment", "kept"), [(None, 4), ("1", 0)])
def test_embed_lets_pillow_keep_memory_unless_the_user_has_said_how_much(environment, kept, tmp_path, monkeypatch):
    before = Image.core.get_blocks_max()
    if environment is not None:
        monkeypatch.setenv("PILLOW_BLOCKS_MAX", environment)
    try:
        Image.core.set_blocks_max(0)
        assert main(["embed", str(bundled.photographs()[0]), "-m", str(EMOJI), "-o", str(tmp_path / "a.db")]) == 0
        assert Image.core.get_blocks_max() == kept
    finally:
        Image.core.set_blocks_max(before)
