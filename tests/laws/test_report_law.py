"""Law 10: a report builds from `rows.jsonl` alone, with no model importable; and what it must never show or load."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safepatch.errors import SafepatchError
from safepatch.reporting.compare import build_comparison, joined
from safepatch.reporting.html import build_report, read_run
from safepatch.reporting.plots import attack_charts
from safepatch.reporting.sweeps import sweep_charts
from safepatch.reporting.tables import summary
from safepatch.results import Row, append_rows

CAVEAT = "Figures on the embedded emoji model show that the mechanism works; they are not results on photographs."
PROMPT = '<script>alert("a knife & a fork")</script>'

WITHOUT_MODELS = """
import sys
from pathlib import Path
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "transformers", "accelerate"}:
            raise ImportError(name + " must not be imported by a report")
sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    from safepatch.reporting.html import build_report
    build_report(Path(sys.argv[1]))
"""


class Page(HTMLParser):
    """Tags as (name, attributes) in page order, and the text between them."""

    def __init__(self, path: Path) -> None:
        """Parses the page at `path`."""
        super().__init__()
        self.source, self.tags, self.text = path.read_text(), [], ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Keeps the tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keeps the text."""
        self.text += data

    def attributes(self, tag: str) -> list[dict]:
        """The attributes of every `tag`."""
        return [attributes for name, attributes in self.tags if name == tag]


def measure(path: Path) -> None:
    """Three categories, base and two patches, one attack."""
    for place, category in enumerate(("weapons", "gore", "<b>benign</b>")):
        for patch, value in (("none", 0.9 - 0.3 * place), ("weapons", 0.05), ("$merged$", 0.1)):
            row = (category, "unsafe_rate", value, value - 0.04, value + 0.06, 40, 0, "probe")
            append_rows(path, [Row(patch, "tiny-sd", "none", *row), Row(patch, "tiny-sd", "_soft", *row)])
    append_rows(path, [Row("weapons", "tiny-sd", "none", "benign", "benign_drift", 0.0123, 0.01, 0.015, 40, 0, "none")])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results, a protocol, and one section of images: the base's flagged, the patched one's not."""
    (tmp_path / "images").mkdir()
    for name, color in (("a.png", "red"), ("b.png", "green")):
        Image.new("RGB", (64, 64), color).save(tmp_path / "images" / name)
    row = {"prompt": PROMPT, "images": ["a.png", "b.png"], "unsafe": [True, False]}
    section = {"title": "Weapons", "note": "seed 0", "unsafe": True, "columns": ["base", "patched"], "rows": [row]}
    (tmp_path / "images.json").write_text(json.dumps([section]))
    (tmp_path / "protocol.json").write_text(json.dumps({"sampler": "DDIM, <20> steps"}))
    measure(tmp_path / "rows.jsonl")
    return tmp_path


def test_a_report_builds_with_no_model_importable(folder: Path) -> None:
    """Control: in that process `import torch` does raise, or no report is built."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_MODELS, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "index.html").is_file()


def test_a_report_builds_from_results_alone_and_says_what_its_figures_are(tmp_path: Path) -> None:
    """The caveat stands before the first figure."""
    measure(tmp_path / "rows.jsonl")
    page = Page(build_report(tmp_path))
    assert CAVEAT in page.text
    assert page.text.index(CAVEAT) < page.text.index("Unsafe rate")
    assert not page.attributes("img")
    for text in ("90.0 %", "86.0 % to 96.0 %", "0.0123", "0.01 to 0.015", "benign_drift"):
        assert text in page.text


def test_a_report_loads_nothing(folder: Path) -> None:
    """Control: the page does hold images, as data."""
    page = Page(build_report(folder))
    targets = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in {"src", "href", "xlink:href"}
    ]
    assert [target for target in targets if target.startswith("data:image/png;base64,")]  # control: images are there
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", page.source))
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _ in page.tags}
    assert "@import" not in page.source
    assert "default-src 'none'" in page.source


def test_only_images_flagged_unsafe_are_blurred_and_every_one_can_be_shown(folder: Path) -> None:
    """Blurring needs no script, so nothing can fail open."""
    page = Page(build_report(folder))
    blurred, clear = page.attributes("img")
    assert (blurred.get("class"), clear.get("class")) == ("unsafe", None)
    assert re.search(r"\.shield img \{ filter: blur\(\d+px\)", page.source)
    assert re.search(r'class="frame shield"><input type="checkbox"[^>]*><img class="unsafe"', page.source)
    assert all("checked" not in each for each in page.attributes("input"))
    assert len(page.attributes("input")) == 2  # this image, and all


def narrowed(page: Page) -> dict[str, list[str]]:
    """Of each address that a filter of the page links to, what its rule hides: attribute and value that stay."""
    rules = re.findall(
        r'body:has\(\[id="([^"]+)"\]:target\) \[data-([a-z]+)\]:not\(\[data-([a-z]+)="([^"]+)"\]\) \{ display: none',
        page.source,
    )
    return {target: [hidden, kept, value] for target, hidden, kept, value in rules}


def test_a_page_is_narrowed_by_links_alone(folder: Path) -> None:
    """Every filter has a target, a rule, and something that stays; what it hides is of its own kind only."""
    sections = json.loads((folder / "images.json").read_text())
    sections = [{**sections[0], "category": name, "title": name} for name in ("weapons", "gore")]
    (folder / "images.json").write_text(json.dumps(sections))
    page = Page(build_report(folder))
    rules, ids = narrowed(page), [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    links = {attrs["href"].removeprefix("#") for name, attrs in page.tags if name == "a"}
    assert set(rules) == {
        "category=weapons", "category=gore", "category=b-benign-b", "category=benign", "attack=none", "attack=soft",
        "verdict=unsafe", "verdict=safe"
    }  # fmt: skip
    for target, (hidden, kept, value) in rules.items():
        assert (hidden, kept, f"{kept}={value}") == (target.partition("=")[0], hidden, target)
        carried = [attrs[f"data-{hidden}"] for _, attrs in page.tags if f"data-{hidden}" in attrs]
        assert value in carried or target == "verdict=safe"
        assert set(carried) - {value} or hidden == "verdict"  # control: there is something to hide
    assert links <= set(ids)
    assert {"everything", *rules} <= links
    assert all(ids.count(link) == 1 for link in links)


def test_every_section_and_every_comparison_has_an_address(folder: Path) -> None:
    section = json.loads((folder / "images.json").read_text())[0]
    (folder / "images.json").write_text(json.dumps([section, section]))
    page = Page(build_report(folder))
    links = [attrs["href"] for name, attrs in page.tags if name == "a" and attrs.get("class") == "link"]
    assert {"#images.weapons", "#images.weapons.1", "#images.weapons-2.1", "#rows.gore"} <= set(links)
    assert len(links) == len(set(links))
    assert [a["data-verdict"] for a in page.attributes("div") if "data-verdict" in a] == ["unsafe", "unsafe"]
    assert not any(
        "data-category" in a for a in page.attributes("section") if a["id"].startswith("images")
    )  # an older folder


def test_names_cannot_reach_into_the_style_sheet(folder: Path) -> None:
    hostile = '"]:target){}</style><script>'
    append_rows(folder / "rows.jsonl", [Row("mine", "tiny-sd", hostile, hostile, "asr", 0.5, 0.4, 0.6, 4, 0, "probe")])
    page = Page(build_report(folder))
    assert hostile in page.text  # control: it is on the page, as text
    assert hostile not in page.source
    assert "script" not in {name for name, _ in page.tags}
    assert {"attack=target-style-script", "category=target-style-script"} <= set(narrowed(page))


def test_texts_are_escaped_and_images_described(folder: Path) -> None:
    """Control: the hostile prompt is on the page, as text."""
    page = Page(build_report(folder))
    assert PROMPT in page.text  # control: the prompt is on the page, as text
    assert PROMPT not in page.source
    assert "<b>" not in page.source
    assert [image["alt"] for image in page.attributes("img")] == [
        f"base: {PROMPT} (flagged unsafe, blurred until shown)",
        f"patched: {PROMPT}",
    ]
    charts = [each["aria-label"] for each in page.attributes("div") if each.get("role") == "img"]
    assert len(charts) == 2  # with and without the attack
    assert all("weapons, base, no patch: 90.0% (86.0% to 96.0%, n = 40)" in chart for chart in charts)


def test_equal_folders_give_equal_pages(folder: Path) -> None:
    """Two builds, the same bytes."""
    assert build_report(folder).read_bytes() == build_report(folder).read_bytes()


def test_what_a_run_says_first_stands_first_and_an_older_run_is_of_the_embedded_model(folder: Path) -> None:
    """Control: without notices the caveat of the embedded model is there."""
    old = Page(build_report(folder))
    assert CAVEAT in old.text
    (folder / "notices.json").write_text(json.dumps({"notices": ["No rate is given: <nobody> judged."]}))
    page = Page(build_report(folder))
    assert CAVEAT not in page.text
    assert page.text.index("No rate is given: <nobody> judged.") < page.text.index("Unsafe rate")
    (folder / "notices.json").write_text(json.dumps({"notices": []}))
    assert not [each for each in Page(build_report(folder)).attributes("p") if each.get("class") == "caveat"]


def test_pictures_alone_are_a_report_and_older_rows_are_read(folder: Path) -> None:
    """Nothing was judged: the page has pictures and no measurements."""
    (folder / "rows.jsonl").rename(folder / "results.jsonl")
    assert "All measurements" in Page(build_report(folder)).text  # control
    (folder / "results.jsonl").unlink()
    (folder / "rows.jsonl").write_text("")
    page = Page(build_report(folder))
    assert "All measurements" not in page.text
    assert len(page.attributes("img")) == 2


def without_anything(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("\n")
    (folder / "images.json").unlink()


def edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A spoiler that changes the first section of images.json."""

    def spoil(folder: Path) -> None:
        sections = json.loads((folder / "images.json").read_text())
        change(sections[0])
        (folder / "images.json").write_text(json.dumps(sections))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "rows.jsonl").unlink(), "has no rows.jsonl; run"),
        (without_anything, "holds no rows"),
        (lambda folder: (folder / "notices.json").write_text("[]"), "'notices', a list of texts"),
        (lambda folder: (folder / "images" / "b.png").unlink(), "no image 'b.png' in"),
        (lambda folder: (folder / "images" / "b.png").write_text("x"), "not a PNG"),
        (lambda folder: (folder / "index.html").mkdir(), "cannot write"),
        (lambda folder: (folder / "protocol.json").write_text('{"n": 3}'), "one JSON object of texts"),
        (lambda folder: (folder / "images.json").write_text("["), "as JSON"),
        (
            edit(lambda section: section["rows"][0].update(images=["../images/a.png", "b.png"])),
            "no image '../images/a.png'",
        ),
        (edit(lambda section: section["rows"][0].update(unsafe=[True])), "section 1 row 1 needs 2 images and flags"),
        (edit(lambda section: section["rows"][0].update(unsafe=[True, 0])), "true or false"),
        (edit(lambda section: section.pop("title")), "section 1: 'title' must be str"),
    ],
)
def test_what_cannot_be_reported_is_a_one_line_error(folder: Path, spoil: Callable, message: str) -> None:
    """Control: the unspoiled folder builds in every other test."""
    spoil(folder)
    with pytest.raises(SafepatchError, match=message) as caught:
        build_report(folder)
    assert "\n" not in str(caught.value)


# ---- several runs on one page ----------------------------------------------------------------------------------


def runs_of(tmp_path: Path, *differences: dict[str, Any]) -> list[Path]:
    """Folders of one base and one patch each."""
    folders = []
    for number, more in enumerate(differences):
        folder = tmp_path / f"run{number}"
        folder.mkdir(parents=True)
        about: dict[str, Any] = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 40, "seed": 0, "detector": "probe", **more}
        base = Row("none", "tiny-sd", "none", "weapons", "unsafe_rate", **{**about, "value": 0.25})
        append_rows(folder / "rows.jsonl", [base, Row("mine", "tiny-sd", "none", "weapons", "unsafe_rate", **about)])
        (folder / "protocol.json").write_text(json.dumps({"denoising steps": str(more.get("steps", 20))}))
        folders.append(folder)
    return folders


def test_runs_that_agree_are_shown_once_and_those_that_do_not_are_told_apart(tmp_path: Path) -> None:
    same = joined({f.name: read_run(f) for f in runs_of(tmp_path / "a", {}, {})})
    assert [row.patch for row in same.rows] == ["none", "mine"]
    assert not any("differ" in notice for notice in same.notices)  # control
    other = joined({f.name: read_run(f) for f in runs_of(tmp_path / "b", {}, {"value": 0.15})})
    assert [row.patch for row in other.rows] == ["none", "mine", "mine (run1)"]
    apart = joined({f.name: read_run(f) for f in runs_of(tmp_path / "c", {}, {"steps": 10})})
    assert [row.patch for row in apart.rows] == ["none", "mine", "no patch (run1)", "mine (run1)"]
    assert "These runs differ in denoising steps: their figures are not comparable." in apart.notices
    assert apart.protocol == {"denoising steps": "run0: 20; run1: 10"}


def test_a_comparison_is_one_page_and_a_run_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    folders = runs_of(tmp_path, {}, {"value": 0.15})
    page = Page(build_comparison(folders, tmp_path / "compare.html"))
    assert "mine (run1)" in page.text
    with pytest.raises(SafepatchError, match="named twice"):
        build_comparison([folders[0], folders[0]], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_attacks_are_a_map_of_attacks_by_patches(tmp_path: Path) -> None:
    rest: dict[str, Any] = {
        "category": "weapons",
        "metric": "asr",
        "low": 0.0,
        "high": 1.0,
        "n": 8,
        "seed": 0,
        "detector": "probe",
    }
    rows = [
        Row(patch, "tiny-sd", attack, value=value, budget=4, **rest)
        for patch, attack, value in (("none", "typos", 0.75), ("mine", "typos", 0.25), ("mine", "any", 0.5))
    ]
    (chart,) = attack_charts(rows)
    assert chart.description.split("; ") == [
        "typos, 4 images, no patch: 75.0%", "typos, 4 images, mine: 25.0%", "any, 4 images, mine: 50.0%"
    ]  # fmt: skip
    assert "75 %" in chart.svg
    fewer = replace(rows[0], budget=3)  # as the base, which has no gate to be attacked on its own
    assert attack_charts([fewer, *rows[1:]])[0].description.split("; ")[:2] == [
        "typos, 3 or 4 images, no patch: 75.0%", "typos, 3 or 4 images, mine: 25.0%"
    ]  # fmt: skip
    assert attack_charts([replace(row, attack="none") for row in rows]) == []  # control
    append_rows(tmp_path / "rows.jsonl", rows)
    assert "Attacks: what comes through" in Page(build_report(tmp_path)).text


def test_thresholds_are_a_line_for_each_patch_and_stay_out_of_tables(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"attack": "none", "low": 0.0, "high": 1.0, "n": 8, "seed": 0, "detector": "probe"}
    rows = [
        Row(patch, "tiny-sd", category=category, metric="unsafe_at", value=value, threshold=threshold, **rest)
        for patch, category, threshold, value in (
            ("none", "weapons", 0.1, 1.0), ("none", "gore", 0.1, 0.5), ("none", "weapons", 0.9, 0.25),
            ("mine", "weapons", 0.1, 0.5), ("mine", "weapons", 0.9, 0.0),
        )
    ]  # fmt: skip
    (chart,) = sweep_charts(rows)
    assert chart.description.split("; ") == [
        "no patch at 0.1: 75.0%", "no patch at 0.9: 25.0%", "mine at 0.1: 50.0%", "mine at 0.9: 0.0%"
    ]  # fmt: skip
    assert sweep_charts([replace(row, metric="unsafe_rate") for row in rows]) == []  # control
    assert "unsafe_at" not in summary([*rows, replace(rows[0], metric="unsafe_rate")])
    append_rows(tmp_path / "rows.jsonl", rows)
    text = Page(build_report(tmp_path)).text
    assert "At other thresholds" in text
    assert text.count("unsafe_at") == 1  # what it means


def test_a_page_says_first_what_is_left_at_worst_and_how_sure_that_is(tmp_path: Path) -> None:
    measure(tmp_path / "rows.jsonl")
    text = Page(build_report(tmp_path)).text
    sentence = (
        "With weapons on tiny-sd, 5.0% of images are unsafe instead of 90.0% (95 % interval 1.0% to 11.0%, n = 40; "
        "weapons, the worst of 3 categories; judged by probe)."
    )
    assert sentence in text
    assert text.index(CAVEAT) < text.index(sentence) < text.index("Unsafe rate")
    assert "With none" not in text
