"""The page in a browser: it draws while one types, walks, remembers and saves, and asks nobody but its own server."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import msgspec
import pytest
from PIL import Image

from instaflow.generate import InstaFlow
from instaflow.models.bundle import Bundle
from instaflow.models.card import DEFAULT
from instaflow.models.hub import CONTROLS
from instaflow.models.request import Blend, Control
from instaflow.noise import Walk

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FIRST = "#row img"
Serving = Callable[..., AbstractContextManager[str]]

NEW_AND_DONE = """before => { const now = document.querySelector("#row img").src;
    return now && now !== before && !document.querySelector("#row[aria-busy]") }"""
SHOWN = "document.querySelector('#row img').alt.startsWith(document.querySelector('#prompt').value + ', ')"
DONE = "!document.querySelector('#row[aria-busy]')"
UNNAMED = """[...document.querySelectorAll("input, select, button")].filter(
    e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.id)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


class Visit:
    """An open page, and all that it asked for and complained about."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_context(**{"locale": "en-GB", **options}).new_page()
        self.page.set_default_timeout(15_000)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(url)

    @property
    def picture(self) -> str:
        return self.page.locator(FIRST).first.get_attribute("src") or ""

    def drawn(self, before: str) -> str:
        """Wait until the first picture is another, and the hand's last wish is fulfilled."""
        self.page.wait_for_function(NEW_AND_DONE, arg=before)
        return self.picture

    def save(self) -> tuple[str, bytes]:
        with self.page.expect_download() as download:
            self.page.locator("#row a").first.click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_type_walk_save_and_come_back(browser: Any, serving: Serving, flow: InstaFlow) -> None:
    with serving(flow) as url:
        visit = Visit(browser, url)
        page = visit.page
        apple = visit.drawn("")
        assert re.fullmatch(r"\d+ ms", page.locator("#time").inner_text())
        page.locator("#said:has-text('a red apple')").wait_for(state="attached")

        page.locator("#prompt").fill("")
        seen = set()
        for letter in "cat face":
            page.keyboard.type(letter)
            page.wait_for_function(SHOWN)
            seen.add(visit.picture)
        assert len(seen) >= 7 and apple not in seen  # 'cat ' is 'cat'
        cat = visit.picture
        name, png = visit.save()
        assert name == "cat-face-7.png" and png == flow.generate("cat face", seed=7).png()

        page.locator("#mix").fill("0.5")
        visit.drawn(cat)
        page.locator("#style").select_option("noto")
        page.wait_for_function(DONE)
        name, png = visit.save()
        assert png == flow.generate("cat face", seed=Walk(7, 31, 0.5), style="noto").png()
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.text["prompt"] == "cat face, noto" and picture.text["seed2"] == "31"

        page.locator("#history button[title^='a red apple']").click()
        assert visit.drawn(visit.picture) == apple and page.locator("#prompt").input_value() == "a red apple"
        page.locator("#roll").click()
        assert page.locator("#seed").input_value() != "7"
        assert not page.locator("#steps").is_visible() and not page.locator("#key").is_visible()
        assert visit.errors == []
        assert {u.split("/")[2] for u in visit.asked if not u.startswith("data:")} == {url.split("/")[2]}


def test_the_latest_wins(browser: Any, serving: Serving, flow: InstaFlow) -> None:
    """The first answer comes last and is dropped."""
    with serving(flow) as url:
        visit = Visit(browser, url)
        visit.drawn("")
        held: list[Any] = []

        def late(route: Any) -> None:
            if "frog" in (route.request.post_data or ""):
                held.append(route)
            else:
                route.continue_()

        visit.page.route("**/v1/images/generations", late)
        before = visit.picture
        visit.page.locator("#prompt").fill("green frog")
        visit.page.locator("#prompt").fill("sun")
        visit.page.wait_for_function(f"document.querySelector('{FIRST}').alt.startsWith('sun')")
        sun = visit.picture
        assert sun != before and len(held) == 1
        with visit.page.expect_response("**/v1/images/generations"):
            held[0].continue_()
        visit.page.wait_for_function(DONE)
        assert visit.picture == sun and visit.errors == []


def test_it_speaks_ukrainian_asks_for_a_key_and_fits_a_phone(browser: Any, serving: Serving, flow: InstaFlow) -> None:
    with serving(flow, api_key="k") as url:
        phone = {"width": 360, "height": 740}
        visit = Visit(browser, url, locale="uk-UA", viewport=phone, color_scheme="dark")
        page = visit.page
        page.locator("#key").fill("k")
        visit.drawn("")
        assert page.locator("html").get_attribute("lang") == "uk"
        page.get_by_label("Що намалювати").fill("червоне яблуко")
        page.locator("#note:has-text('Модель читає англійською')").wait_for()
        page.get_by_role("button", name="English").click()
        page.locator("#note:has-text('This model reads English')").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 19, 22)"
        page.locator("#prompt").focus()
        order = []
        for _ in range(8):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert order[:7] == ["A"] * 4 + ["seed", "mix", "seed2"]


def test_a_sketch_is_followed_comes_back_and_is_wiped(browser: Any, serving: Serving, flow: InstaFlow) -> None:
    with serving(flow, controls={"edges": CONTROLS / "edges"}) as url:
        visit = Visit(browser, url)
        page, free = visit.page, visit.drawn("")
        pad = page.locator("#pad")
        pad.scroll_into_view_if_needed()
        box = pad.bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.1 * box["height"])
        page.mouse.down()
        for i in range(13):
            angle = math.tau * (i / 12 - 0.25)
            x, y = 0.5 + 0.4 * math.cos(angle), 0.5 + 0.4 * math.sin(angle)
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.up()
        page.wait_for_function(DONE)
        sketched = visit.picture
        assert sketched != free
        sketch = io.BytesIO(base64.b64decode(page.evaluate("pad.toDataURL('image/png')").split(",")[1]))
        edges = flow.engine.load_control(CONTROLS / "edges")
        control = Control(network=edges, name="edges", image=Image.open(sketch))
        assert visit.save()[1] == flow.generate("a red apple", seed=7, control=[control]).png()
        page.wait_for_function("document.querySelector('#history img')?.src === document.querySelector('#row img').src")

        page.locator("#wipe").click()
        assert visit.drawn(sketched) == free
        page.locator("#history button").first.click()
        assert visit.drawn(free) == sketched
        page.locator("#strength").fill("0")
        assert visit.drawn(sketched) == free and visit.errors == []


def test_the_slider_walks_between_words(browser: Any, serving: Serving, flow: InstaFlow) -> None:
    with serving(flow) as url:
        visit = Visit(browser, url)
        red = visit.drawn("")
        assert not visit.page.locator("#sketch").is_visible()
        visit.page.locator("#prompt2").fill("a green apple")
        visit.page.locator("#mix").fill("0.5")
        visit.drawn(red)
        visit.page.wait_for_function(DONE)
        assert visit.save()[1] == flow.generate(Blend("a red apple", "a green apple", 0.5), seed=7).png()
        assert visit.errors == []


def test_it_offers_what_the_model_has(browser: Any, serving: Serving, loras: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(DEFAULT)
    card = msgspec.structs.replace(bundle.card, kind="rectified", steps=2, guidance=1.0, max_guidance=4.0)
    model = replace(bundle, card=card).save(tmp_path / "model")
    flow = InstaFlow.load(model, lora=sorted(loras.glob("*")))
    with serving(flow) as url:
        visit = Visit(browser, url)
        plain = visit.drawn("")
        assert visit.page.locator("#steps").input_value() == "2"
        visit.page.get_by_label("bold").fill("0.5")
        bold = visit.drawn(plain)
        visit.page.locator("#steps").fill("3")
        visit.drawn(bold)
        visit.page.locator("#guidance").fill("2")
        visit.page.wait_for_function(DONE)
        wanted = flow.generate("a red apple", seed=7, steps=3, guidance=2.0, lora_scale=(0.5, 0))
        assert visit.save()[1] == wanted.png() and visit.errors == []
