"""Renders emoji of free licences as image folders with captions, the data of the embedded pair.

    npm packages -> SVG -> restyled SVG -> PNG of 84 pixels on white + metadata.jsonl

    python -m tools.make_emoji FOLDER              fetches the packages with npm and writes FOLDER/train, FOLDER/noto
    python -m tools.make_emoji FOLDER --packages P    uses packages fetched before (P/NAME.tgz or P/NAME.json)

`train` holds every style but Noto, `noto` holds Noto alone: a style that no training sees. So that five styles teach
more than five, `train` holds each drawing also in other colours, tilted, some with outlines. Skin tones and country
flags (of which Noto's package has none) are left out. Needs resvg-py (extra `train`) and npm.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 84
UNSEEN = "noto"
STYLES = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "fluent-emoji-flat": "MIT",
    "fluent-emoji": "MIT",
    "fxemoji": "Apache-2.0",
    "emojione": "CC-BY-4.0",
}
"""Style (npm package @iconify-json/STYLE) -> the licence its info.json must state; share-alike sets are left out."""

KEYWORDS = "emojibase-data"
"""The npm package (MIT) with Unicode's labels and keywords."""

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
MAX_KEYWORDS = 8

RESTYLED = 2
"""How often each drawing of the training styles appears in another style, beside as it is."""

TILT, LEAST_SIZE, OUTLINED = 12.0, 0.8, 0.3
"""Of a restyled drawing: degrees to either side, the smallest scale, the share that gets outlines."""

HUE, SATURATION, BRIGHTNESS = 0.04, 0.4, 0.2
"""The largest change of each colour of a restyled drawing, in turns of the circle and as shares."""

COLOUR = re.compile(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b")


@dataclass(frozen=True)
class Emoji:
    """One drawing: its style, its name in Noto's words, the SVG's inside and its box (left, top, width, height)."""

    style: str
    name: str
    body: str
    box: tuple[float, float, float, float]

    @property
    def svg(self) -> str:
        """The whole SVG."""
        box = " ".join(f"{value:g}" for value in self.box)
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{self.body}</svg>'


def main() -> None:
    parser = argparse.ArgumentParser(description="Render emoji as image folders with captions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="folder of packages that npm pack has fetched")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        packages = arguments.packages or fetch(Path(place))
        write(packages, arguments.folder)


def fetch(place: Path) -> Path:
    """Every package as a .tgz in `place`, from the registry that npm is configured for."""
    for package in (*(f"@iconify-json/{style}" for style in STYLES), KEYWORDS):
        subprocess.run(["npm", "pack", package, "--silent"], cwd=place, check=True, stdout=subprocess.DEVNULL)
    return place


def write(packages: Path, folder: Path) -> None:
    """Renders all styles: FOLDER/train and FOLDER/noto, each with metadata.jsonl."""
    names, keywords = Names(packages), read_keywords(packages)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], UNSEEN: []}
    for style in STYLES:
        part = UNSEEN if style == UNSEEN else "train"
        (folder / part).mkdir(parents=True, exist_ok=True)
        count = 0
        for emoji in emojis(packages, style, names):
            text = captions(emoji.name, keywords.get(names.codes[emoji.name]))
            drawings = {f"{emoji.name}.png": emoji}
            if part == "train":
                drawings = {f"{style}-{emoji.name}.png": emoji} | {
                    f"{style}-{emoji.name}-{number}.png": restyled(emoji, number) for number in range(1, RESTYLED + 1)
                }
            for file, drawing in drawings.items():
                (folder / part / file).write_bytes(rendered(drawing.svg))
                rows[part].append({"file_name": file, "text": text})
                count += 1
        print(f"{style}: {count} images")
    for part, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / part / "metadata.jsonl").write_text(text, encoding="utf-8")


class Names:
    """Every style's names in Noto's words: by code point where a package says it, else by the letters alone."""

    def __init__(self, packages: Path) -> None:
        icons, by_code = (read_package(packages, UNSEEN, file) for file in ("icons.json", "chars.json"))
        self.by_code = {code: name for code, name in by_code.items() if is_wanted(code, name)}
        self.codes = {name: code for code, name in self.by_code.items()}
        self.by_letters = {letters(name): name for name in self.codes}
        for alias, about in icons.get("aliases", {}).items():
            if about["parent"] in self.codes:
                self.by_letters.setdefault(letters(alias), about["parent"])

    def of(self, name: str, codes: str | None) -> str | None:
        """Noto's name of another style's icon, None where Noto has no such emoji."""
        return self.by_code.get(codes or "") or self.by_letters.get(letters(name))


def emojis(packages: Path, style: str, names: Names) -> Iterator[Emoji]:
    """The drawings of a style that Noto has too, each name once. Raises ValueError for another licence than stated."""
    stated = read_package(packages, style, "info.json")["license"]["spdx"]
    if stated != STYLES[style]:
        raise ValueError(f"{style}: wanted the licence {STYLES[style]}, its info.json states {stated}")
    icons = read_package(packages, style, "icons.json")
    try:
        code_of = {name: code for code, name in read_package(packages, style, "chars.json").items()}
    except KeyError:
        code_of = {}
    done: set[str] = set()
    for icon, drawing in icons["icons"].items():
        name = names.of(icon, code_of.get(icon))
        if name is None or name in done or drawing.get("hidden"):
            continue
        done.add(name)
        left, top, width, height = (drawing.get(key, icons.get(key, default)) for key, default in BOX)
        yield Emoji(style, name, drawing["body"], (left, top, width, height))


BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def restyled(emoji: Emoji, number: int) -> Emoji:
    """The same drawing as another hand might have made it; always the same for the same name and number."""
    chance = np.random.default_rng(zlib.crc32(f"{emoji.style} {emoji.name} {number}".encode()))
    found: dict[str, str] = {}
    body = COLOUR.sub(lambda match: found.setdefault(match[0], changed(match[0], chance)), emoji.body)
    left, top, width, height = emoji.box
    middle = left + width / 2, top + height / 2
    scale = chance.uniform(LEAST_SIZE, 1)
    place = " ".join(
        (
            f"translate({middle[0]:g} {middle[1]:g})",
            f"rotate({chance.uniform(-TILT, TILT):.1f}) scale({scale:.2f})",
            f"translate({-middle[0]:g} {-middle[1]:g})",
        )
    )
    outline = ""
    if chance.random() < OUTLINED:
        outline = f' stroke="#333" stroke-width="{width * chance.uniform(0.01, 0.03):.2f}" stroke-linejoin="round"'
    return Emoji(emoji.style, emoji.name, f'<g transform="{place}"{outline}>{body}</g>', emoji.box)


def changed(colour: str, chance: np.random.Generator) -> str:
    """A colour (#rgb or #rrggbb) a little different in hue, saturation and brightness."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    hue, saturation, brightness = colorsys.rgb_to_hsv(*(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)))
    hue = (hue + chance.uniform(-HUE, HUE)) % 1
    saturation = min(1.0, saturation * chance.uniform(1 - SATURATION, 1 + SATURATION))
    brightness = min(1.0, brightness * chance.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue, saturation, brightness))


def is_wanted(codes: str, name: str) -> bool:
    """Whether an emoji is used: no skin tone, by code point or by name."""
    return not SKIN_TONES & set(codes.split("-")) and "-tone" not in name


def letters(name: str) -> str:
    return name.replace("-", "")


def rendered(svg: str) -> bytes:
    """SVG -> PNG of SIZE x SIZE pixels on white."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white"))


def captions(name: str, about: dict[str, Any] | None) -> list[str]:
    """The captions of an emoji: its name first, then Unicode's label and keywords, alone and by threes.

    Alone, because that is how people search; few at a time, so that a batch of captions stays short.
    """
    said = [name.replace("-", " ")]
    if about is not None:
        said.append(about["label"].replace(":", "").replace("’", "'").lower())
        tags = [tag for tag in about.get("tags", []) if tag.isascii()][:MAX_KEYWORDS]
        said += tags + [", ".join(tags[i : i + 3]) for i in range(0, len(tags), 3) if len(tags) > 1]
    return list(dict.fromkeys(said))


def read_keywords(packages: Path) -> dict[str, dict[str, Any]]:
    """Code points as iconify writes them -> Unicode's label and tags."""
    found = read_package(packages, KEYWORDS, "en/data.json")
    return {one["hexcode"].lower().replace("-fe0f", ""): one for one in found}


def read_package(packages: Path, package: str, file: str) -> Any:
    """A JSON file of a package that npm has packed. Raises KeyError where the package has no such file."""
    name = package if package == KEYWORDS else f"@iconify-json/{package}"
    stem = name.removeprefix("@").replace("/", "-")
    found = sorted(packages.glob(f"{stem}-[0-9]*.tgz"))
    if not found:
        raise FileNotFoundError(f"{packages} has no {stem}-*.tgz; fetch it with: npm pack {name}")
    with tarfile.open(found[-1]) as archive:
        member = archive.extractfile(f"package/{file}")
        assert member is not None
        return json.load(member)


if __name__ == "__main__":
    main()
