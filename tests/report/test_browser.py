"""The page in Chromium: it draws without complaint, answers mouse and keyboard, and fits a phone."""

from __future__ import annotations

import time

import pytest

from lorazor.report.drawing import DARK, LIGHT
from lorazor.report.page import draw_together, make_page, make_sections
from lorazor.report.reading import read_runs
from lorazor.report.suite_page import make_suite_section
from lorazor.report.suites import read_suite_results
from tests.report import made_up_suites, synthetic_runs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of every kind of run at once."""
    root = tmp_path_factory.mktemp("page")
    names = ("boundary", "shrink", "weights", "curves", "train", "eval")
    runs = read_runs([getattr(synthetic_runs, f"{name}_run")(root / name) for name in names])
    path = root / "report.html"
    path.write_text(make_page(make_sections(runs, 20), draw_together(runs)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from tests.report.chromium import chromium

    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def opened(browser, page):
    """Open the page; gives the driver."""
    from tests.report.chromium import draw_all, show

    def open_page(width: int = 1280, scheme: str = "light"):
        show(browser, page, width, scheme=scheme)
        draw_all(browser)
        return browser

    return open_page


def ground(driver) -> str:
    return driver.execute_script(
        "return getComputedStyle(document.documentElement).getPropertyValue('--ground').trim()"
    )


def test_all_figures_are_drawn_and_nothing_is_complained_of(opened):
    driver = opened()
    drawn, places = driver.execute_script(
        "return [document.querySelectorAll('.plot .main-svg').length > 0, "
        "[...document.querySelectorAll('.plot')].map(place => place.querySelectorAll('.main-svg').length > 0)]"
    )
    assert drawn and len(places) >= 9 and all(places)
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_reaches_over_the_side(width, scheme, opened):
    driver = opened(width, scheme)
    driver.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert ground(driver) == (LIGHT if scheme == "light" else DARK)["ground"]


def test_foreign_text_does_nothing(browser, tmp_path):
    from tests.report.chromium import draw_all, show
    from tests.report.test_page import poison

    run = synthetic_runs.shrink_run(tmp_path / "run", n_layers=3, n_examples=4)
    poison(run)
    runs = read_runs([run])
    (tmp_path / "report.html").write_text(make_page(make_sections(runs, 20)), encoding="utf-8")
    show(browser, tmp_path / "report.html", 390)
    draw_all(browser)
    assert browser.get_log("browser") == []  # an alert would have raised
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 1280])
def test_a_suite_fits_and_is_drawn(width, browser, tmp_path):
    from tests.report.chromium import draw_all, show

    methods = [("base", [None]), ("lora", [None]), ("low-rank", [0.125]), ("weightlora-every-step", [0.125, 0.05])]
    losses = {"base": 0.9, "lora": 0.2, "low-rank": 0.3, "weightlora-every-step": 0.4}
    rows = made_up_suites.grid(["sst2"], methods, [0, 1, 2], lambda task, method, budget, seed: losses[method])
    suite = make_suite_section(read_suite_results(made_up_suites.write_suite(tmp_path / "suite", rows)))
    (tmp_path / "report.html").write_text(make_page([], suite=suite), encoding="utf-8")
    show(browser, tmp_path / "report.html", width)
    draw_all(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
    drawn = browser.execute_script("return document.querySelectorAll('.plot .main-svg').length")
    assert browser.get_log("browser") == [] and drawn >= len(suite.drawings) == 2
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_button_changes_the_colours_of_page_and_figures(opened):
    from selenium.webdriver.common.by import By

    driver = opened()
    ink = "return document.querySelector('.plot .xtick text, .plot .ytick text').style.fill"
    before = driver.execute_script(ink)
    button = driver.find_element(By.ID, "theme")
    assert button.text.endswith("Dark")
    button.click()
    assert button.text.endswith("Light") and ground(driver) == DARK["ground"]
    assert driver.execute_script(ink) != before


def test_a_tooltip_tells_of_the_site_under_the_mouse(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    driver = opened()
    place = driver.find_element(By.CSS_SELECTOR, "#run-2-sites .plot")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    time.sleep(0.5)
    cells = place.find_element(By.CSS_SELECTOR, ".heatmaplayer, .hm, .plot")
    for offset in (0, 5, 10):  # the first movement only enters the figure
        ActionChains(driver).move_to_element_with_offset(cells, offset, offset).perform()
        time.sleep(0.3)
    told = driver.execute_script("return document.querySelector('#run-2-sites .hoverlayer').textContent")
    assert "model.layers." in told and "credit" in told and "parameters" in told


def test_the_keyboard_reaches_the_controls_in_reading_order(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    driver = opened()
    what = "const one = document.activeElement; return one.id || one.getAttribute('href') || one.tagName.toLowerCase()"
    reached = []
    for _ in range(14):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        reached.append(driver.execute_script(what))
    assert reached[0] == "#main", "the link past the navigation comes first"
    assert reached[1:8] == ["#main", *(f"#run-{number}" for number in range(1, 7))]
    assert reached[8:10] == ["theme", "div"], "the button, then the table that scrolls"
    assert "summary" in reached
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_keyboard_opens_an_example(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = opened()
    closed = driver.find_element(By.CSS_SELECTOR, "details.example:not([open]) > summary")
    closed.send_keys(Keys.ENTER)
    assert driver.execute_script("return arguments[0].parentElement.open", closed)
