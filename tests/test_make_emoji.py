"""The drawings that the embedded pair learns from: their captions, their other styles, their licences."""

import colorsys
import io
import json
import tarfile

import numpy as np
import pytest

from tools import make_emoji
from tools.make_emoji import Emoji, captions, changed, restyled

DRAWING = Emoji(
    "twemoji", "red-heart", '<path fill="#DD2E44" d="M0 0h9v9z"/><path fill="#fff" d="M1 1h2z"/>', (0, 0, 36, 36)
)


def package(folder, style: str, **files: object) -> None:
    """A package as npm packs it."""
    with tarfile.open(folder / f"iconify-json-{style}-1.0.0.tgz", "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path):
    """Noto with three emoji, one of them with a skin tone, and Twemoji with two of these."""
    icons = {name: {"body": "<path/>"} for name in ("red-heart", "owl", "ok-hand-dark-skin-tone")}
    codes = {"2764": "red-heart", "1f989": "owl", "1f44c-1f3ff": "ok-hand-dark-skin-tone"}
    package(tmp_path, "noto", icons={"icons": icons, "width": 128, "height": 128}, chars=codes)
    other = {"redheart": {"body": "<g/>"}, "hoot": {"body": "<b/>"}, "unknown": {"body": "<i/>"}}
    package(
        tmp_path,
        "twemoji",
        info={"license": {"spdx": "CC-BY-4.0"}},
        icons={"icons": other, "width": 36, "height": 36},
        chars={"1f989": "hoot"},
    )
    return tmp_path


def test_other_styles_get_notos_names_by_code_or_by_letters(packages):
    found = list(make_emoji.emojis(packages, "twemoji", make_emoji.Names(packages)))
    assert [(emoji.name, emoji.box) for emoji in found] == [("red-heart", (0, 0, 36, 36)), ("owl", (0, 0, 36, 36))]
    assert found[1].svg.endswith('viewBox="0 0 36 36"><b/></svg>')


def test_a_package_of_another_licence_is_refused(packages):
    package(packages, "twemoji", info={"license": {"spdx": "CC-BY-SA-4.0"}}, icons={"icons": {}})
    with pytest.raises(
        ValueError, match=r"twemoji: wanted the licence CC-BY-4\.0, its info\.json states CC-BY-SA-4\.0"
    ):
        list(make_emoji.emojis(packages, "twemoji", make_emoji.Names(packages)))


def test_a_missing_package_is_named_with_what_fetches_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no iconify-json-noto-\*\.tgz; fetch it with: npm pack @iconify-json/noto"
    ):
        make_emoji.Names(tmp_path)


def test_a_restyled_drawing_is_another_one_and_always_the_same():
    once, again, other = restyled(DRAWING, 1), restyled(DRAWING, 1), restyled(DRAWING, 2)
    assert once == again
    assert len({DRAWING.body, once.body, other.body}) == 3
    assert "#DD2E44" not in once.body
    assert (once.name, once.box) == (DRAWING.name, DRAWING.box)


def test_some_drawings_get_outlines():
    outlined = sum("stroke" in restyled(DRAWING, number).body for number in range(200))
    assert 0.2 < outlined / 200 < 0.4


@pytest.mark.parametrize("colour", ["#DD2E44", "#12ff09", "#369", "#000", "#fff"])
def test_a_colour_changes_a_little(colour):
    def parts(text: str) -> tuple[float, float, float]:
        digits = text[1:] if len(text) == 7 else "".join(2 * digit for digit in text[1:])
        return colorsys.rgb_to_hsv(*(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)))

    chance = np.random.default_rng(1)
    hue, saturation, brightness = parts(colour)
    for _ in range(50):
        found = parts(changed(colour, chance))
        if saturation > 0:
            assert abs((found[0] - hue + 0.5) % 1 - 0.5) <= make_emoji.HUE + 0.02
        assert abs(found[1] - saturation) <= make_emoji.SATURATION * saturation + 0.02
        assert abs(found[2] - brightness) <= make_emoji.BRIGHTNESS * brightness + 0.02


def test_captions_are_the_name_then_the_label_then_keywords_alone_and_by_threes():
    about = {"label": "Birthday: Cake", "tags": ["cake", "sweet", "pastry", "crème", "party"]}
    wanted = ["birthday cake", "cake", "sweet", "pastry", "party", "cake, sweet, pastry"]
    assert captions("birthday-cake", about) == wanted
    assert captions("birthday-cake", None) == ["birthday cake"]
