"""The report in a real browser: nothing is loaded or complained of, unsafe pictures are blurred until asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from safepatch.reporting.html import build_report
from safepatch.results import Row, append_rows
from tests.browser import By, Keys, browser, webdriver  # skips where there is none


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two categories, a patch, thresholds, an attack, and two prompts of which one ended in an unsafe picture."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "images").mkdir()
    for name, color in (("a.png", "red"), ("b.png", "green")):
        Image.new("RGB", (64, 64), color).save(folder / "images" / name)
    pictures = [{"prompt": f"prompt {i}", "images": ["a.png", "b.png"], "unsafe": [i == 0, False]} for i in range(2)]
    common = {"note": "seed 0", "unsafe": True, "columns": ["base", "patched"]}
    sections = [{"title": name, "category": name, "rows": pictures, **common} for name in ("weapons", "gore")]
    (folder / "images.json").write_text(json.dumps(sections))
    for category in ("weapons", "gore"):
        for patch, value in (("none", 0.9), ("mine", 0.1)):
            row = (category, "unsafe_rate", value, value - 0.05, value + 0.05, 40, 0, "probe")
            append_rows(folder / "rows.jsonl", [Row(patch, "tiny-sd", "none", *row)])
            swept = (category, "unsafe_at", value, value, value, 40, 0, "probe")
            rows = [Row(patch, "tiny-sd", "none", *swept, threshold=threshold) for threshold in (0.1, 0.9)]
            append_rows(folder / "rows.jsonl", rows)
    return build_report(folder)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(driver, page) -> webdriver.Chrome:
    driver.set_window_size(1200, 900)
    driver.get("about:blank")
    driver.get(page.as_uri())
    return driver


def blurred(driver) -> int:
    """How many pictures are blurred."""
    pictures = driver.find_elements(By.CSS_SELECTOR, "img")
    return sum("blur" in picture.value_of_css_property("filter") for picture in pictures)


def test_nothing_is_complained_of(shown):
    assert shown.get_log("browser") == []
    shown.execute_script("console.error('heard')")  # control
    assert "heard" in str(shown.get_log("browser"))


def test_a_click_and_a_key_show_an_unsafe_picture_and_hide_it_again(shown):
    assert blurred(shown) == 2
    shown.find_elements(By.CSS_SELECTOR, ".shield")[0].click()
    assert blurred(shown) == 1
    shown.find_elements(By.CSS_SELECTOR, ".shield input")[0].send_keys(Keys.SPACE)
    assert blurred(shown) == 2
    shown.find_element(By.CSS_SELECTOR, ".switch").click()
    assert blurred(shown) == 0


def test_a_filter_leaves_one_category_and_its_address_brings_it_back(shown, page):
    def titles() -> set[str]:
        found = shown.find_elements(By.CSS_SELECTOR, "section[data-category] h3")
        return {title.text.split()[0] for title in found if title.is_displayed()}

    assert titles() == {"weapons", "gore"}
    shown.find_element(By.CSS_SELECTOR, ".filters a[aria-label*='category gore']").click()
    assert titles() == {"gore"}
    address = shown.current_url
    shown.get("about:blank")
    shown.get(address)
    assert titles() == {"gore"}


@pytest.mark.parametrize("width", [360, 1200])
def test_no_page_is_wider_than_its_window(shown, width):
    shown.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    widths = shown.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths[0] <= widths[1] == width


def test_a_dark_page_is_dark(shown):
    def page_color() -> str:
        return shown.execute_script("return getComputedStyle(document.body).backgroundColor")

    colors = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        colors.append(page_color())
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colors == ["rgb(246, 247, 249)", "rgb(15, 18, 22)"]
