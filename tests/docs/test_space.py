"""The demo: its functions, and the page in a headless browser. `make test-space` says what that needs."""

import importlib.util
import os
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import yaml
from repository import ROOT

from efficient_transformers import VARIANTS

SPACE = ROOT / "space"


def test_the_space_runs_with_the_version_that_is_tested():
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    pins = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
    assert metadata["sdk"] == "gradio"
    assert metadata["sdk_version"] == pins["gradio"]
    assert (SPACE / metadata["app_file"]).exists()
    assert len(metadata["short_description"]) <= 60  # the Hub's limit


@pytest.fixture(scope="module")
def app():
    sys.path.insert(0, str(SPACE))
    try:
        yield __import__("app")
    finally:
        sys.path.remove(str(SPACE))


@pytest.mark.space
@pytest.mark.parametrize("slug", VARIANTS)
def test_every_variant_can_be_picked(app, slug):
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "by", "the", "door"]
    for heads, knob, causal in ((1, 4, False), (3, 1, VARIANTS[slug].causal)):
        figure, price, coloured, said = app.show(slug, 12, knob, heads, causal, " ".join(words), 5, 7, 512)
        assert figure.axes
        assert "| 512 | " in price
        assert [word.strip("▶◀ ") for word, _ in coloured] == words[:12]
        read = [weight is not None for _, weight in coloured]
        assert said.startswith(f"Token 5 attends to {sum(read)} of 12 tokens")
        assert not (causal and any(read[6:]))
        assert slug != "local" or read == [abs(j - 5) <= knob and not (causal and j > 5) for j in range(12)]
    assert "full attention" in app.speed(slug, 4, 2, False, 64)


@pytest.mark.space
def test_what_cannot_be_is_said(app):
    import gradio

    with pytest.raises(gradio.Error, match="FNet cannot be causal"):
        app.show("fnet", 12, 4, 2, True, "two words", 0, 0, 512)
    with pytest.raises(gradio.Error, match="at least two words"):
        app.show("local", 12, 4, 2, False, "one", 0, 0, 512)


@pytest.fixture
def without_gradio(monkeypatch):
    """The page's functions where gradio, which draws the page, is not installed."""
    refused = type("Error", (Exception,), {})
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(Error=refused, Blocks=object))
    spec = importlib.util.spec_from_file_location("space_functions", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENTS = {
    "none": (None, "is empty"),
    "empty": ("", "is empty"),
    "white space": (" \n\t ", "only white space"),
    "one word": ("word", "at least two words"),
    "long": ("a b " * 10_000, "has 40,000 characters, and this page takes 20,000"),
    "binary": ("a b \x00\x01", "as a binary file does"),
    "wrong encoding": ("a b \ufffd", "as a binary file does"),
}


@pytest.mark.parametrize(("text", "message"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_that_cannot_be_shown_is_refused(without_gradio, text, message):
    with pytest.raises(without_gradio.gr.Error, match=message):
        without_gradio.show("local", 12, 4, 2, False, text, 0, 0, 512)


@pytest.mark.parametrize(
    ("name", "value"), [("length", 10**9), ("knob", 0), ("heads", 9), ("token", -1), ("tokens", 10**6), ("tokens", "9")]
)
def test_values_that_no_control_has_are_refused(without_gradio, name, value):
    given = {"length": 12, "knob": 4, "heads": 2, "token": 0, "head": 0, "tokens": 512, name: value}
    with pytest.raises(without_gradio.gr.Error, match=f"{name} must be a whole number from"):
        without_gradio.show("local", causal=False, text="two words", **given)


def test_words_of_a_document_are_never_markup(without_gradio):
    """Two of the results are shown as Markdown, the coloured words as text."""
    image = "![x](https://example.org/pixel.png)"
    _, price, coloured, said = without_gradio.show(
        "local", 12, 4, 2, False, f"{image} and {image} {'w' * 99}", 0, 0, 512
    )
    assert image in coloured[0][0]
    assert "example.org" not in price + said
    assert max(len(word) for word, _ in coloured) < 50


def test_memory_that_is_short_is_explained(without_gradio):
    def allocate():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(without_gradio.gr.Error, match="more memory than the page may use"):
        without_gradio.within_memory(allocate)()


@pytest.fixture(scope="module")
def address():
    port = "7872"
    environment = os.environ | {"GRADIO_SERVER_PORT": port, "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen([sys.executable, str(SPACE / "app.py")], env=environment)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=10).close()
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.space
def test_the_page_in_a_browser(address, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1340"):
        options.add_argument(argument)
    options.binary_location = "/usr/bin/chromium"
    browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        browser.get(address)

        def text(name: str) -> str:
            return browser.find_element(By.ID, name).text

        def wait(condition) -> None:
            WebDriverWait(browser, 120).until(lambda _: condition())

        wait(lambda: "attends to 12 of 64 tokens" in text("said"))
        first = browser.find_element(By.CSS_SELECTOR, "#picture img").get_attribute("src")
        choice = browser.find_element(By.CSS_SELECTOR, "#variant input")
        choice.send_keys(Keys.CONTROL, "a")
        choice.send_keys("BigBird", Keys.ENTER)
        wait(lambda: "n·block_size·d" in text("cost"))
        wait(lambda: browser.find_element(By.CSS_SELECTOR, "#picture img").get_attribute("src") != first)
        document = browser.find_element(By.CSS_SELECTOR, "#document textarea")
        document.clear()
        document.send_keys("a short document of my own", Keys.SHIFT, Keys.ENTER)
        wait(lambda: "of 6 tokens" in text("said"))
        assert "▶own◀" in text("reads")
        browser.find_element(By.ID, "measure").click()
        wait(lambda: "times as long" in text("speed"))
        browser.save_screenshot(str(tmp_path / "space.png"))
        assert (tmp_path / "space.png").stat().st_size > 20_000
    finally:
        browser.quit()


def test_the_screenshot_is_small():
    assert (SPACE.parent / "docs" / "space.png").stat().st_size < 300_000
