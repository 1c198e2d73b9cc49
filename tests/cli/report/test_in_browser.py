"""The page as a browser shows it: nothing on the console, no request, readable at every width."""

import json
import shutil

import numpy as np
import pytest

from eplb.cli.main import main
from eplb.cli.report.palette import DARK, LIGHT

WIDTHS = (390, 1024, 1920)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with reports of a plan, of a recording and of a replay."""
    folder = tmp_path_factory.mktemp("reports")
    rng = np.random.default_rng(0)
    # Names as long as paths get, which must not widen the page.
    scenario = [
        "/data/recordings/2026-11-25/" + "a-long-name/" * 6 + str(w // 6) for w in range(12)
    ]
    counts = rng.poisson(rng.lognormal(3, 1, (6, 64)), (12, 6, 64))
    loads, plan = str(folder / "loads.npz"), str(folder / "plan.yaml")
    np.savez(loads, counts=counts, scenario=scenario)
    topology = ("--nodes", "3", "--ranks-per-node", "8", "--slots-per-rank", "3")
    for words in (
        ("plan", loads, *topology, "--holdout", "50%", "-o", plan),
        ("report", plan, loads, "--previous", plan, "-o", str(folder / "plan.html")),
        ("profile", "show", loads, "--html", str(folder / "profile.html")),
        ("replay", loads, *topology, "--every", "3", "--policy", "resolve", "--html",
         str(folder / "replay.html")),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        assert not stop.value.code
    return folder


@pytest.fixture
def show(browser, folder):
    """Open a page at a width, light or dark, and return the browser."""

    def call(name, width=1024, scheme="light"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get((folder / f"{name}.html").as_uri())
        return browser

    yield call
    browser.get_log("browser")
    browser.get_log("performance")


@pytest.mark.parametrize("name", ["plan", "profile", "replay"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_quiet_and_fit(show, name, width):
    page = show(name, width)
    assert page.get_log("browser") == []
    requests = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert requests
    assert all(url.startswith(("file:", "data:")) for url in requests)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => e.innerText && "
        "!e.closest('.picture') && parseFloat(getComputedStyle(e).fontSize) < 12).length"
    ) == 0  # fmt: skip


def test_every_picture_is_drawn_within_its_card(show):
    page = show("plan", 390)
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.picture')].map(place => {"
        "const chart = place.querySelector('svg, canvas');"
        "return [place.id, chart ? chart.getBoundingClientRect().right : null];})"
    )
    assert len(drawn) >= 8
    for key, right in drawn:
        assert right is not None, key
        assert 200 < right <= 390, key
    painted = page.execute_script(
        "return [...document.querySelectorAll('canvas')].map(c => new Set(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data).size)"
    )
    assert all(colours > 2 for colours in painted)


def test_the_page_follows_the_window_and_the_theme(show):
    page = show("plan", 1024)

    def of_page(what):
        return page.execute_script(f"return getComputedStyle(document.body).{what}")

    def rgb(colour):
        return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"

    assert of_page("backgroundColor") == rgb(LIGHT["page"])
    stroke = "return document.querySelector('#picture-layers svg').innerHTML"
    assert LIGHT["after"] in page.execute_script(stroke)
    page = show("plan", 1024, "dark")
    assert of_page("backgroundColor") == rgb(DARK["page"])
    assert DARK["after"] in page.execute_script(stroke)
    # Paper is white whatever the screen is.
    page.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert LIGHT["after"] in page.execute_script(stroke)
    page.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert DARK["after"] in page.execute_script(stroke)


def test_all_values_of_a_heat_map_are_a_table_when_asked_for(show):
    page = show("plan")
    rows, columns, first = page.execute_script(
        "const d = document.querySelector('details[data-values=ranks-after]');"
        "d.open = true;"
        "return new Promise(done => setTimeout(() => { const t = d.querySelector('table');"
        "done([t.rows.length, t.rows[0].cells.length, t.rows[1].cells[1].textContent]); }, 100));"
    )
    assert (rows, columns) == (7, 25)
    assert float(first) > 0


def test_the_keyboard_reaches_the_content(show):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page = show("plan")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the content"
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.execute_script("return document.activeElement.id") == "content"


def test_names_from_files_do_nothing(show, folder):
    evil = "<img src=x onerror='document.title=1'>"
    counts = np.random.default_rng(0).poisson(9, (4, 2, 8))
    np.savez(folder / "evil.npz", counts=counts, scenario=[evil, evil, "$after", "b"])
    with pytest.raises(SystemExit):
        main(["profile", "show", str(folder / "evil.npz"), "--html", str(folder / "evil.html")])
    page = show("evil")
    assert page.get_log("browser") == []
    assert page.title == "Expert loads of evil.npz - eplb report"
    assert page.execute_script("return document.images.length") == 0
