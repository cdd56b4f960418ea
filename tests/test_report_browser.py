"""The page in a real browser, headless Chromium: films that go together, charts that are read.

Skipped where there is no browser. All of it is slow: a browser takes seconds to start.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("selenium", reason="the extra `dev` is not installed")

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from maml_rl.assess import load_subject
from maml_rl.config import load_experiment
from maml_rl.movies import Mp4, has_ffmpeg
from maml_rl.rendering import FORMAT, RECORD, Column, Rendering
from maml_rl.report.page import make_report
from maml_rl.results import write_own_test
from maml_rl.train import meta_train
from tests.tiny import SETTINGS

pytestmark = pytest.mark.slow

Browser = webdriver.Chrome
EVIL = "<img src=x onerror=alert(1)>"
FPS, FRAMES = 10.0, 12
"""Of the films."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser that keeps what pages complain of and what they ask the network for."""
    driver = shutil.which("chromedriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or program is None:
        pytest.skip("there is no Chromium with its chromedriver on the PATH")
    options = Options()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        started = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"the browser does not start: {error.msg}")
    started.set_script_timeout(20)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tested runs of different settings, the second with a name that is a tag."""
    folder = tmp_path_factory.mktemp("runs")
    for name, layers in (("plain-seed0", [8, 5]), (EVIL, [4])):
        settings = {**SETTINGS, "policy__layers": layers, "evaluation__steps": 3}
        meta_train(load_experiment("navigation", **settings), out=folder / name)
        write_own_test(load_subject(folder / name))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """The page of the first, with four films of two tasks: grey that gets lighter."""
    if not has_ffmpeg():
        pytest.skip("there is no ffmpeg to make films with: pip install 'maml-rl[video]'")
    videos = folder / "plain-seed0" / "video"
    videos.mkdir()
    columns = []
    for step in range(4):
        film = Mp4(videos / f"steps_{step}.mp4", FPS)
        for frame in range(FRAMES):
            film.append(np.full((64, 32, 3), 20 * frame + step, np.uint8))
        film.close()
        columns.append(Column(step, film.path.name, (-9.5 + step, -3.0), ("", "arrived")))
    made = Rendering(
        checkpoint="latest",
        iterations=3,
        mean=False,
        fps=FPS,
        slow=1.0,
        frames=FRAMES,
        tasks=((0.1, 0.2), (0.3, 0.4)),
        task_words=("near", "far"),
        columns=tuple(columns),
        video=None,
        strips=(),
        trouble="",
    )
    (videos / RECORD).write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(made)}))
    return make_report([folder / "plain-seed0"], None, say=lambda text: None)


def show(browser: Browser, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Open a page in a window of a width and in a colour scheme; a narrow one is a phone's."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preferred]})
    for kind in ("browser", "performance"):
        log(browser, kind)
    browser.get(page.as_uri())


def log(browser: Browser, kind: str) -> list[str]:
    """What has come into one of the browser's logs since it was read last."""
    entries = browser.get_log(kind)  # type: ignore[no-untyped-call]  # selenium's
    return [str(entry["message"]) for entry in entries]


def move(browser: Browser, x: int, y: int) -> None:
    """Move the mouse to a place of the window."""
    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(x, y)  # type: ignore[no-untyped-call]
    mouse.perform()


def find(browser: Browser, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def wait(condition: Callable[[], object], what: str) -> None:
    """Wait until something holds, at most 20 s."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.05)


def films(browser: Browser, of: str) -> list[float]:
    """One property of every film."""
    found: list[float] = browser.execute_script(
        f"return [...document.querySelectorAll('video')].map((film) => film.{of})"
    )
    return found


def show_films(browser: Browser, page: Path) -> None:
    """Open a page and wait until each film has a picture."""
    show(browser, page)
    wait(lambda: min(films(browser, "readyState")) >= 2, "every film has a picture")


def times(browser: Browser) -> list[float]:
    """Where every film is, seconds, when none is on its way elsewhere."""
    wait(lambda: not any(films(browser, "seeking")), "no film seeks")
    return films(browser, "currentTime")


def tip(browser: Browser, chart: str) -> list[str]:
    """The lines of what a chart shows of a point."""
    return find(browser, f'[data-chart="{chart}"] .tip').text.splitlines()


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_page_complains_of_nothing_and_loads_nothing(browser: Browser, page: Path) -> None:
    """No line in the console; the only addresses asked for are the file's and data: in it."""
    show_films(browser, page)
    assert log(browser, "browser") == []
    entries = [json.loads(text)["message"] for text in log(browser, "performance")]
    asked = [
        entry["params"]["request"]["url"]
        for entry in entries
        if entry["method"] == "Network.requestWillBeSent"
    ]
    assert asked[0] == page.as_uri()
    assert [url for url in asked[1:] if not url.startswith("data:")] == []


def test_a_page_forbids_itself_the_network(browser: Browser, page: Path) -> None:
    """Even a script in it could not call home."""
    show(browser, page)
    refused = browser.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => {})"
    )
    assert refused == "connect-src"


def test_every_film_can_be_seen(browser: Browser, page: Path) -> None:
    """Four, each with pictures of its own size; none plays before it is asked to."""
    show_films(browser, page)
    assert films(browser, "videoWidth") == [32] * 4
    assert films(browser, "videoHeight") == [64] * 4
    assert films(browser, "duration") == pytest.approx([FRAMES / FPS] * 4)
    time.sleep(0.3)
    assert films(browser, "paused") == [True] * 4
    assert films(browser, "currentTime") == [0] * 4
    assert find(browser, "output").text == "0.00 of 1.10 s"


def test_the_scrubber_moves_all_films(browser: Browser, page: Path) -> None:
    """A frame for each press of an arrow, and to the end."""
    show_films(browser, page)
    scrubber = find(browser, "input[type=range]")
    scrubber.send_keys(*[Keys.ARROW_RIGHT] * 5)
    assert times(browser) == pytest.approx([0.5] * 4)
    assert find(browser, "output").text == "0.50 of 1.10 s"
    scrubber.send_keys(Keys.ARROW_LEFT)
    assert times(browser) == pytest.approx([0.4] * 4)
    scrubber.send_keys(Keys.END)
    assert times(browser) == pytest.approx([1.2] * 4)
    ActionChains(browser).move_to_element(scrubber).click().perform()
    assert times(browser) == pytest.approx([0.6] * 4, abs=0.11)
    assert len(set(times(browser))) == 1


def test_all_films_play_together_and_again(browser: Browser, page: Path) -> None:
    """Within two frames of one another; past the end from the start; on pause at one instant."""
    show_films(browser, page)
    button = find(browser, "button")
    button.click()
    assert button.text == "Pause"
    seen: list[float] = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        now = films(browser, "currentTime")
        # Beginning again, one may be there before another.
        if min(now) > 0.2 and max(now) < 1.0:
            assert max(now) - min(now) < 2 / FPS
        seen.append(now[0])
        time.sleep(0.02)
    assert max(seen) > 0.9
    begun = next(i for i, (a, b) in enumerate(itertools.pairwise(seen)) if b < a - 0.5)
    assert max(seen[begun + 1 :]) > 0.3
    button.click()
    assert button.text == "Play"
    assert films(browser, "paused") == [True] * 4
    assert len(set(times(browser))) == 1


def test_speed_is_that_of_all_films(browser: Browser, page: Path) -> None:
    show_films(browser, page)
    find(browser, "select").send_keys("0.25")
    assert films(browser, "playbackRate") == [0.25] * 4


def test_space_plays_from_the_player_and_from_its_button(browser: Browser, page: Path) -> None:
    """Once, and not twice where the button has the focus."""
    show_films(browser, page)
    for selector in (".player", "button", "input[type=range]"):
        find(browser, selector).send_keys(" ")
        wait(lambda: not any(films(browser, "paused")), "all play")
        find(browser, selector).send_keys(" ")
        wait(lambda: all(films(browser, "paused")), "none plays")


# Where the nth marker of a chart is on the screen, from the path that draws it.
PLACE = """
const svg = [...document.querySelectorAll(`[data-chart="${arguments[0]}"] svg`)]
  .find((one) => one.getClientRects().length);
svg.scrollIntoView({block: "center"});
const starts = [...svg.querySelector(".mark").getAttribute("d").matchAll(/M(\\S+) (-?[\\d.]+)/g)];
const [, x, y] = starts[arguments[1]];
const at = new DOMPoint(Number(x), Number(y)).matrixTransform(svg.getScreenCTM());
return [Math.round(at.x), Math.round(at.y)];
"""


def test_hovering_a_point_shows_its_value(browser: Browser, page: Path) -> None:
    """Method, gradient steps, and the mean return and interval that the table has."""
    show(browser, page)
    table = rows(page.parent / "evaluation" / "evaluation.csv")
    for step, words in ((0, "before adapting"), (2, "after 2 gradient steps")):
        x, y = browser.execute_script(PLACE, "returns", step)
        move(browser, x + 2, y - 2)
        mine = [float(r["return_mean"]) for r in table if r["gradient_steps"] == str(step)]
        name, where, value, interval = tip(browser, "returns")
        assert (name, where) == ("maml", words)
        assert value == f"return of an episode: {np.mean(mine):.1f}"
        assert interval.startswith("95 % interval: ")
    move(browser, 3, 3)
    assert tip(browser, "returns") == []


def test_a_touch_shows_a_value(browser: Browser, page: Path) -> None:
    """On a phone, of the smaller picture."""
    show(browser, page, width=390)
    x, y = browser.execute_script(PLACE, "tasks-0", 0)
    for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    wait(lambda: tip(browser, "tasks-0"), "the touched point is shown")
    assert tip(browser, "tasks-0")[0] == "before"
    assert tip(browser, "tasks-0")[1].startswith("task ")


def test_arrow_keys_walk_through_points(browser: Browser, page: Path) -> None:
    """A chart is one stop of the tab key; escape ends it."""
    show(browser, page)
    chart = find(browser, '[data-chart="returns"]')
    assert chart.find_elements(By.CSS_SELECTOR, "[tabindex], a, button") == []
    browser.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.ARROW_RIGHT)
    assert tip(browser, "returns")[1] == "before adapting"
    chart.send_keys(Keys.ARROW_RIGHT)
    assert tip(browser, "returns")[1] == "after 1 gradient step"
    chart.send_keys(Keys.END)
    assert tip(browser, "returns")[1] == "after 3 gradient steps"
    chart.send_keys(Keys.ARROW_RIGHT)
    assert tip(browser, "returns")[1] == "after 3 gradient steps"
    chart.send_keys(Keys.ESCAPE)
    assert tip(browser, "returns") == []
    tasks = find(browser, '[data-chart="tasks-0"]')
    browser.execute_script("arguments[0].focus()", tasks)
    tasks.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    name, task, _ = tip(browser, "tasks-0")
    assert name == "after 3 steps"
    tasks.send_keys(Keys.ARROW_UP)
    assert tip(browser, "tasks-0")[:2] == ["before", task]
    tasks.send_keys(Keys.TAB)
    assert tip(browser, "tasks-0") == []


def test_the_table_has_the_numbers_of_evaluation_csv(browser: Browser, page: Path) -> None:
    """As they are shown, and exactly in the page's `data` elements."""
    show(browser, page)
    table = rows(page.parent / "evaluation" / "evaluation.csv")
    cells = browser.find_elements(By.CSS_SELECTOR, "#scores tbody tr")
    assert len(cells) == 4
    for step, row in enumerate(cells):
        mine = [float(r["return_mean"]) for r in table if r["gradient_steps"] == str(step)]
        value = row.find_element(By.CSS_SELECTOR, "td:not([rowspan]) data")
        assert float(value.get_attribute("value") or "") == pytest.approx(np.mean(mine), rel=1e-12)
        assert value.text == f"{np.mean(mine):.1f}"


def test_a_run_called_like_a_tag_is_shown_as_that(browser: Browser, folder: Path) -> None:
    """In heading, legend and tip; nothing of it is run."""
    several = make_report([folder / "plain-seed0", folder / EVIL], None, say=lambda text: None)
    show(browser, several)
    assert find(browser, "h1").text == f"plain-seed0 and {EVIL}"
    assert f"maml ({EVIL})" in find(browser, ".legend").text
    chart = find(browser, '[data-chart="returns"]')
    browser.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert tip(browser, "returns")[0] == f"maml ({EVIL})"
    assert browser.find_elements(By.CSS_SELECTOR, "img") == []
    assert log(browser, "browser") == []


def test_a_phone_shows_all_of_it(browser: Browser, page: Path) -> None:
    """Nothing wider than the screen but tables that scroll; films two by two; smaller charts."""
    show(browser, page, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    tops = [film.rect["y"] for film in browser.find_elements(By.CSS_SELECTOR, "video")]
    assert tops[0] == tops[1] < tops[2] == tops[3]
    for size, seen in (("wide", False), ("narrow", True)):
        pictures = browser.find_elements(By.CSS_SELECTOR, f"svg.{size}")
        assert {picture.is_displayed() for picture in pictures} == {seen}
    show(browser, page)
    for size, seen in (("wide", True), ("narrow", False)):
        pictures = browser.find_elements(By.CSS_SELECTOR, f"svg.{size}")
        assert {picture.is_displayed() for picture in pictures} == {seen}
    tops = [film.rect["y"] for film in browser.find_elements(By.CSS_SELECTOR, "video")]
    assert len(set(tops)) == 1


def test_the_scheme_is_the_readers(browser: Browser, page: Path) -> None:
    """Dark on light, or light on dark, and the charts' colours with it."""
    found: list[list[str]] = []
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
        body = find(browser, "body")
        line = find(browser, '[data-chart="returns"] .wide .curve')
        colours = [body.value_of_css_property(n) for n in ("background-color", "color")]
        found.append([*colours, line.value_of_css_property("stroke")])
    light, dark = found
    assert light[0] == "rgba(255, 255, 255, 1)"
    assert dark[0] == "rgba(20, 24, 28, 1)"
    assert light[1] != dark[1]
    assert (light[2], dark[2]) == ("rgb(0, 114, 178)", "rgb(74, 168, 224)")


def test_headings_are_in_order_and_pictures_have_words(
    browser: Browser, page: Path, folder: Path
) -> None:
    """One h1, no level left out, landmarks; every image, film and control named."""
    both = [folder / "plain-seed0", folder / EVIL]
    several = make_report(both, folder / "both.html", say=lambda text: None)
    for one in (page, several):
        show(browser, one)
        found = browser.find_elements(By.CSS_SELECTOR, "h1,h2,h3,h4,h5")
        levels = [int(heading.tag_name[1]) for heading in found]
        assert (levels[0], levels.count(1)) == (1, 1)
        assert max(b - a for a, b in itertools.pairwise(levels)) == 1
        assert find(browser, "html").get_attribute("lang") == "en"
        for name in ("main", "header", "nav"):
            assert len(browser.find_elements(By.TAG_NAME, name)) == 1
        for kind in ("svg[role=img]", "video", "[role=application]", "[role=region]", "input"):
            elements = browser.find_elements(By.CSS_SELECTOR, kind)
            named = [element.accessible_name for element in elements if element.is_displayed()]
            assert named
            assert all(named), kind
