"""The sprite atlas: one RGBA tile per concept and vendor, read from the package, cut from the vendors' art.

`python -m safepatch.tiny.sprites ART OUT` rebuilds the atlas from the unpacked npm packages (`make tiny` fetches them;
SVG files are drawn by resvg-py); everything else only reads it.
"""

import io
import json
from functools import cache
from pathlib import Path

from PIL import Image

from safepatch.errors import SafepatchError
from safepatch.tiny.world import CONCEPTS

ATLAS = Path(__file__).parent.parent / "assets" / "atlas"
TILE = 48  # pixels
COLUMNS = 12
VENDORS: dict[str, str] = {
    "noto": "google/package/img/google/64/{code:0>4}{suffix}.png",
    "twemoji": "twitter/package/img/twitter/64/{code:0>4}{suffix}.png",
    "fluent": "fluent/package/assets/{code}{suffix}.webp",
}
# Art that no embedded model draws in: more to learn from for the second detector, and some that no detector has seen.
MORE: dict[str, str] = {
    "fluent-flat": "flat/package/assets/{code}{suffix}.svg",
    "emojione": "emojione/package/assets/png_128x128/{code:0>4}{suffix}.png",  # of 2016: lacks seven concepts
}
UNSEEN: dict[str, str] = {"openmoji": "openmoji/package/color/svg/{CODE}{SUFFIX}.svg"}

# Unicode code points of the art, chosen by looking at all three vendors' drawings.
# fmt: off
CODES: dict[str, str] = {
    "knife": "1f52a", "dagger": "1f5e1", "swords": "2694", "axe": "1fa93", "bomb": "1f4a3", "blood": "1fa78",
    "bone": "1f9b4", "organ": "1fac0", "brain": "1f9e0", "lungs": "1fac1", "pill": "1f48a", "syringe": "1f489",
    "cigarette": "1f6ac", "mushroom": "1f344", "herb": "1f33f", "beer": "1f37a", "wine": "1f377",
    "cocktail": "1f378", "whisky": "1f943", "champagne": "1f37e", "ghost": "1f47b", "skull": "1f480",
    "demon": "1f479", "spider": "1f577", "bat": "1f987", "cat": "1f431", "dog": "1f436", "panda": "1f43c",
    "pig": "1f437", "frog": "1f438", "chick": "1f425", "penguin": "1f427", "owl": "1f989", "fish": "1f420",
    "whale": "1f433", "turtle": "1f422", "butterfly": "1f98b", "ladybug": "1f41e", "fox": "1f98a", "crab": "1f980",
    "apple": "1f34e", "banana": "1f34c", "carrot": "1f955", "grapes": "1f347", "watermelon": "1f349",
    "strawberry": "1f353", "pizza": "1f355", "donut": "1f369", "cake": "1f382", "candy": "1f36c",
    "ice cream": "1f366", "milk": "1f95b", "coffee": "2615", "spoon": "1f944", "hammer": "1f528", "scissors": "2702",
    "paintbrush": "1f58c", "pencil": "270f", "candle": "1f56f", "umbrella": "2602", "balloon": "1f388",
    "ball": "26bd", "gift": "1f381", "crown": "1f451", "snowman": "26c4", "robot": "1f916", "teddy bear": "1f9f8",
    "car": "1f697", "airplane": "2708", "house": "1f3e0", "droplet": "1f4a7", "star": "2b50", "rose": "1f339",
    "cactus": "1f335", "clover": "1f340", "tree": "1f333",
}
# fmt: on


@cache
def sprites(vendor: str) -> dict[str, Image.Image]:
    """Every concept's tile of one vendor that has one: RGBA, 48 x 48 pixels."""
    path = ATLAS / f"{vendor}.png"
    if not path.is_file():
        raise SafepatchError(f"no sprite atlas at {path}; run `make tiny`, or reinstall safepatch")
    sheet = Image.open(path).convert("RGBA")
    names = json.loads((ATLAS / "atlas.json").read_text())["concepts"]
    tiles = {name: sheet.crop(_box(index)) for index, name in enumerate(names)}
    return {name: tile for name, tile in tiles.items() if tile.getbbox()}


def _box(index: int) -> tuple[int, int, int, int]:
    left, top = index % COLUMNS * TILE, index // COLUMNS * TILE
    return left, top, left + TILE, top + TILE


def build_atlas(art: Path, out: Path) -> None:
    """Cut the atlases from unpacked vendor art in `art` and write them, with an index, to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = -(-len(CONCEPTS) // COLUMNS)
    for vendor, pattern in (VENDORS | MORE | UNSEEN).items():
        sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for index, name in enumerate(CONCEPTS):
            source = _source(art, pattern, CODES[name])
            if source or vendor not in MORE:
                tile = _opened(source, CODES[name], art)
                sheet.paste(tile.resize((TILE, TILE), Image.Resampling.LANCZOS), _box(index)[:2])
        sheet.save(out / f"{vendor}.png", optimize=True)
    index = {"tile": TILE, "columns": COLUMNS, "concepts": list(CONCEPTS), "codes": CODES}
    (out / "atlas.json").write_text(json.dumps(index, indent=1) + "\n")


def _source(art: Path, pattern: str, code: str) -> Path | None:
    for suffix in ("", "-fe0f"):
        path = art / pattern.format(code=code, suffix=suffix, CODE=code.upper(), SUFFIX=suffix.upper())
        if path.is_file():
            return path
    return None


def _opened(path: Path | None, code: str, art: Path) -> Image.Image:
    if path is None:
        raise SafepatchError(f"no art for {code} under {art}; unpack the npm packages there (see `make tiny`)")
    if path.suffix != ".svg":
        return Image.open(path).convert("RGBA")
    import resvg_py  # only this recipe needs it  # pyright: ignore[reportMissingImports]

    drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=4 * TILE, height=4 * TILE)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


if __name__ == "__main__":
    import sys

    build_atlas(Path(sys.argv[1]), Path(sys.argv[2]))
