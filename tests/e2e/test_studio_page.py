"""The studio in a real browser: clicked through, without a complaint, wide and narrow, light and dark."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import uvicorn

from safepatch.hosting.limits import Keys
from safepatch.models.load import load_pipeline
from safepatch.studio.desk import Desk
from safepatch.studio.jobs import Jobs
from safepatch.studio.service import create_app
from tests.browser import By, WebDriverWait, browser, sized, webdriver  # skips where there is none
from tests.integration.test_studio import Files

pytestmark = pytest.mark.e2e
LONG = 240  # seconds that a busy machine may take


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def address(files) -> Iterator[str]:
    start = replace(files.settings, patches=(files.weapons, files.gore), images=2, out=str(files.folder / "out"))
    with socket.create_server(("127.0.0.1", 0)) as ours, Jobs() as jobs:
        app = create_app(Desk(load_pipeline, start), jobs, Keys(), ("127.0.0.1",))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [ours]})
        thread.start()
        yield f"http://127.0.0.1:{ours.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.set_window_size(1200, 900)
        yield opened


@pytest.fixture
def shown(driver, address) -> webdriver.Chrome:
    driver.get("about:blank")
    driver.get(address)
    driver.get_log("browser")
    return driver


def press(driver, name: str) -> None:
    """A button, and wait for what comes of it."""
    button = driver.find_element(By.ID, name)
    driver.execute_script("arguments[0].closest('details')?.setAttribute('open', '')", button)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    WebDriverWait(driver, LONG).until(lambda _: button.is_enabled())


def message(driver) -> str:
    return driver.find_element(By.ID, "message").text


def fill(driver, name: str, text: str) -> None:
    field = driver.find_element(By.NAME, name)
    field.clear()
    field.send_keys(text)


def commands(driver) -> str:
    return driver.find_element(By.ID, "commands").text


def pictures(driver) -> list:
    return driver.find_elements(By.CSS_SELECTOR, "#result img")


def blurred(driver) -> int:
    return sum("blur" in picture.value_of_css_property("filter") for picture in pictures(driver))


def test_it_is_clicked_through_without_a_complaint(shown, files: Files):
    press(shown, "draw")
    assert message(shown) == ""
    assert len(pictures(shown)) == 4
    assert len(shown.find_elements(By.CSS_SELECTOR, ".openings svg")) == 2
    assert blurred(shown) == 4  # nothing can judge this model
    shown.find_element(By.CSS_SELECTOR, "#result .shield").click()
    assert blurred(shown) == 3
    shown.find_element(By.ID, "show-all").click()
    assert blurred(shown) == 0
    press(shown, "merge")
    assert "weapons" in shown.find_element(By.CSS_SELECTOR, "#result table").text
    press(shown, "attack")
    assert len(pictures(shown)) == 4  # as it stands, and three tries
    fill(shown, "out", str(files.folder / "both.safetensors"))
    press(shown, "keep")
    assert (files.folder / "both.safetensors").is_file()
    assert shown.get_log("browser") == []
    shown.execute_script("console.error('heard')")  # control
    assert "heard" in str(shown.get_log("browser"))


def test_what_is_set_stands_in_the_address_and_comes_back(shown, address):
    fill(shown, "seed", "41")
    slider = shown.find_element(By.NAME, "scale.gore")
    shown.execute_script(
        "arguments[0].value = 0.5; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", slider
    )
    WebDriverWait(shown, LONG).until(lambda _: "gore=0.5" in commands(shown) and "--seed 41" in commands(shown))
    link = shown.current_url
    assert link != address
    shown.get("about:blank")
    shown.get(link)
    assert shown.find_element(By.NAME, "seed").get_attribute("value") == "41"
    assert shown.find_element(By.NAME, "scale.gore").get_attribute("value") == "0.5"
    assert pictures(shown) == []


def test_what_goes_wrong_is_said_and_nothing_is_lost(shown, files: Files):
    press(shown, "draw")
    fill(shown, "model", str(files.folder / "nowhere.safetensors"))
    press(shown, "draw")
    assert "nowhere.safetensors" in message(shown)
    WebDriverWait(shown, LONG).until(lambda _: "nowhere.safetensors" in commands(shown))  # the settings' own answer
    assert "nowhere.safetensors" in message(shown)
    assert shown.find_element(By.NAME, "prompt").get_attribute("value") == "a knife"
    assert len(pictures(shown)) == 4
    fill(shown, "model", files.model)
    press(shown, "draw")
    assert message(shown) == ""  # control


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1200, False)])
def test_no_page_is_wider_than_its_window_and_a_dark_one_is_dark(shown, width, dark):
    with sized(shown, width, dark):
        press(shown, "draw")
        widths = shown.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        color = shown.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert widths[0] <= widths[1] == width
    assert color == ("rgb(15, 18, 22)" if dark else "rgb(246, 247, 249)")
