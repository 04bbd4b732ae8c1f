"""A report in a browser: it fits every width, asks for nothing, and answers to mouse and keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdiff.evaluation.report import write_report

from .browser import CHROMIUM, Browser
from .report_support import config, evaluation, row, write_evaluations, write_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

LONG = "a-name-of-a-run-that-is-much-longer-than-a-telephone-is-wide-" * 2


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one run, and one of two."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("circle", "a class name without any space in it that goes on and on".replace(" ", ""), "square")
    runs = [
        write_run(folder / name, of=config(names), previews=(50, 100), samples=6, environment={"device": LONG})
        for name in ("short", LONG)
    ]
    lines = [evaluation(step, 3000.0 / step, **dict.fromkeys("abcdefgh", 1e-7)) for step in (50, 100)]
    write_evaluations(runs[0], lines, best=lines[-1])
    alone = write_run(folder / "alone", progress=[row(10, 1.0)])
    for name, of in {"one": runs[:1], "two": runs, "alone": [alone]}.items():
        write_report(of, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in ("one", "two", "alone")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.mark.parametrize("width", [320, 375, 768, 1440])
@pytest.mark.parametrize("name", ["one", "two", "alone"])
def test_it_fits_and_asks_for_nothing(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.open(pages[name], width)
    browser.js("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.js("document.querySelector('#explain').click()")
    assert browser.js("document.documentElement.scrollWidth") == width
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 1
    assert [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")] == []
    assert browser.js("[...document.images].filter(image => image.src).every(image => image.naturalWidth > 0)")


def test_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    found = {}
    for scheme in ("light", "dark"):
        browser.open(pages["one"], 1440, scheme)
        found[scheme] = browser.js("getComputedStyle(document.body).backgroundColor")
    assert found == {"light": "rgb(251, 251, 249)", "dark": "rgb(20, 23, 26)"}


def test_values_of_a_curve(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"], 1440)
    browser.js("document.querySelector('.plot').scrollIntoView({block: 'center'})")
    left, top, width = browser.js(
        "(b => [b.left, b.top, b.width])(document.querySelector('.plot').getBoundingClientRect())"
    )
    browser.mouse(left + 0.49 * width, top + 50)
    said = browser.js("document.getElementById('tip').innerText")
    assert said.startswith("step 50\nshort, logged\n0.2\n"), said
    browser.js("document.querySelector('.plot').focus()")
    for key in ("Home", "ArrowRight"):
        browser.key(key)
    assert browser.js("document.getElementById('tip').innerText").startswith("step 20\nshort, logged\n0.5\n")
    browser.js("document.querySelector('input[data-run=\"0\"]').click()")
    browser.key("ArrowRight")
    assert browser.js("document.getElementById('tip').innerText").startswith(f"step 30\n{LONG}, logged\n0.3333\n")
    browser.key("Escape")
    assert browser.js("document.getElementById('tip').hidden")


def test_previews_follow_the_slider_and_the_choice(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["two"], 768)
    shown = "[...document.querySelectorAll('.preview')].filter(p => p.offsetParent).map(p => p.innerText)"
    assert browser.js(shown) == ["step 100, EMA 0.9999"] * 2
    browser.js("document.querySelector('input[type=range]').focus()")
    browser.key("ArrowLeft")
    assert browser.js(shown) == ["step 50, EMA 0.9999"] * 2
    browser.js("document.querySelectorAll('input[name=average]')[1].click()")
    assert browser.js(shown) == ["step 50, raw weights"] * 2
    assert browser.js("document.querySelector('output').textContent") == "50"


def test_samples_enlarge(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], 375)
    browser.js("document.querySelector('.grid button').scrollIntoView({block: 'center'})")
    left, top = browser.js("(b => [b.left, b.top])(document.querySelector('.grid button').getBoundingClientRect())")
    browser.mouse(left + 9, top + 9, "mousePressed", "mouseReleased")
    opened = "document.getElementById('zoom').open && document.querySelector('#zoom p').textContent"
    assert browser.js(opened) == "image 1, circle"
    assert browser.js("document.querySelector('#zoom img').width") > 200
    browser.key("ArrowRight")
    assert browser.js(opened).startswith("image 2, aclass")
    closed = "new Promise(done => document.getElementById('zoom').addEventListener('close', () => done(true)))"
    browser.js(f"window.zoomClosed = {closed}; 0")
    browser.key("Escape")
    assert browser.js("window.zoomClosed")
    assert browser.js(opened) is False
    assert browser.js("document.activeElement.title").startswith("image 2")


def test_paper_shows_what_is_folded(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"], 1440)
    browser("Emulation.setEmulatedMedia", media="print")
    browser.js("dispatchEvent(new Event('beforeprint'))")
    assert browser.js("[...document.querySelectorAll('details')].every(one => one.open)")
    assert browser.js("getComputedStyle(document.querySelector('.controls')).display") == "none"
    browser.js("dispatchEvent(new Event('afterprint'))")
    assert browser.js("[...document.querySelectorAll('details')].every(one => !one.open)")
    browser("Emulation.setEmulatedMedia", media="")
