"""The page in a real browser, by clicks and keys; whatever it says on its console fails the test."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offsite.protos import runs_pb2 as pb
from offsite.protos.events import Completed, Measured, Selected
from offsite.protos.figures import FIGURES

from .conftest import Browser, Coordinator
from .test_pages import REPORT, SCORE, round_of

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402 (it is there)
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PROGRAMS = [shutil.which(name) for name in ("chromium", "chromedriver")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(None in PROGRAMS, reason="there is no Chromium: apt install chromium chromium-driver"),
]
AXE = "axe-core@4.14.1"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A browser without a screen."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(PROGRAMS[0])
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1100,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(PROGRAMS[1])))
    yield made
    made.quit()


class Chromium:
    """The browser, logged in."""

    def __init__(self, driver: Any, browser: Browser) -> None:
        self.driver, self._home = driver, f"http://127.0.0.1:{browser.port}"
        self.driver.get(f"{self._home}/login?token={browser.access.link()}")
        self.until(lambda: self.driver.current_url == f"{self._home}/")

    def open(self, path: str) -> None:
        self.driver.get(self._home + path)

    def until(self, true: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: true())

    def see(self, text: str) -> None:
        """Wait until the page says something."""
        self.until(lambda: text in self.driver.find_element(By.TAG_NAME, "body").text)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)


@pytest.fixture
def chromium(driver: Any, browser: Browser) -> Iterator[Chromium]:
    yield Chromium(driver, browser)
    driver.get("about:blank")
    assert driver.get_log("browser") == []


def fill(coordinator: Coordinator) -> None:
    """A run with something in each part of its page, and one that is under way."""
    figures = dict.fromkeys(FIGURES, 5.0)
    report = REPORT | {"sites": {"ward": figures}, "overall": figures}
    coordinator.add("aaaa1111", name="notes of wards", state="completed", report=report, task="ward", rounds=2)
    coordinator.runs["aaaa1111"].artifacts.append(pb.Artifact(name="adapter/adapter.safetensors", digest="d", size=9))
    coordinator.tell("aaaa1111", Selected(sites=("bank", "ward")), *round_of(1, "bank", "ward"))
    coordinator.tell(
        "aaaa1111", Measured(name="plug_in:1", sets=SCORE), Measured(name="plug_in", sets=SCORE), Completed()
    )
    coordinator.add("bbbb2222", name="under way", rounds=3, start="aaaa1111:2")
    coordinator.tell("bbbb2222", Selected(sites=("ward",)), *round_of(1, "ward")[:3])
    coordinator.sites = [pb.Site(name=name, seen_at=1.7e9, examples=3, version="0.1") for name in ("bank", "ward")]
    gone = pb.Withdrawal(at=1.7e9, by="olga", reason="it forgot")
    coordinator.lineage = [
        pb.Version(
            run="aaaa1111", round=1, task="ward", owner="alice", at=1.7e9, sites=["bank", "ward"], withdrawal=gone
        ),
        pb.Version(run="aaaa1111", round=2, task="ward", owner="alice", at=1.7e9, figures={"plug_in": 4.0}),
        pb.Version(run="bbbb2222", round=1, owner="alice", at=1.7e9, start="aaaa1111:2"),
    ]


def test_from_the_run_file_to_the_result_without_a_reload(chromium: Chromium, coordinator: Coordinator) -> None:
    chromium.one("a[href='/submit']").click()
    chromium.driver.execute_script("window.untouched = true")
    spec = chromium.one("#spec")
    spec.clear()
    spec.send_keys('model = "base"\nrounds = 0\n')
    chromium.one("button[type=submit]").click()
    chromium.see("rounds")  # in the answer
    assert "greater than" in chromium.one("#answer").text
    spec.clear()
    spec.send_keys('model = "base"\nname = "mine"\nrounds = 2\n')
    chromium.one("button[type=submit]").click()
    chromium.until(lambda: "/runs/" in chromium.driver.current_url)
    chromium.see("Cancel the run")
    run = chromium.driver.current_url.rpartition("/")[2]
    coordinator.tell(run, Selected(sites=("bank", "ward")), *round_of(1, "bank", "ward"), state="running")
    chromium.see("Training loss")
    coordinator.runs[run].report = json.dumps(REPORT)
    coordinator.tell(run, *round_of(2, "bank", "ward"), Completed(), state="completed")
    chromium.see("not protected: the attack is stronger".capitalize())
    assert "Cancel the run" not in chromium.one("#head").text
    assert chromium.driver.execute_script("return window.untouched"), "the page was loaded again"


def test_a_run_is_cancelled_by_keyboard(chromium: Chromium, coordinator: Coordinator) -> None:
    fill(coordinator)
    chromium.open("/runs/bbbb2222")
    chromium.see("training at the sites")
    body = chromium.one("body")
    body.send_keys(Keys.TAB)
    assert chromium.driver.switch_to.active_element.text == "Skip to the page"
    for _ in range(20):
        focus = chromium.driver.switch_to.active_element
        if focus.text == "Cancel the run":
            break
        focus.send_keys(Keys.TAB)
    focus.send_keys(Keys.ENTER)
    asked = chromium.until(lambda: chromium.driver.switch_to.alert)
    assert "Cancel this run?" in asked.text
    asked.accept()
    chromium.until(lambda: coordinator.runs["bbbb2222"].state == "cancelled")
    chromium.see("cancelled")


def test_the_graph_of_versions_leads_to_runs(chromium: Chromium, coordinator: Coordinator, tmp_path: Path) -> None:
    fill(coordinator)
    chromium.open("/versions")
    chromium.see("go on from bbbb2222:1")
    chromium.one("svg a[href='/runs/aaaa1111']").click()
    chromium.see("notes of wards")
    chromium.until(lambda: len(chromium.driver.find_elements(By.CSS_SELECTOR, "#plots svg[role=img]")) == 3)
    assert chromium.driver.save_screenshot(str(tmp_path / "run.png"))
    chromium.driver.set_window_size(390, 800)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert chromium.driver.execute_script(wide) <= 0, "a narrow page is not wider than its window"


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core, which finds what is hard to use for those who do not see or point."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("axe-core comes with npm: apt install npm")
    packed = subprocess.run(["npm", "pack", AXE], cwd=folder, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip(f"npm cannot fetch {AXE}: {packed.stderr[-300:]}")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/", "under way"),
        ("/runs/aaaa1111", "Learned and forgotten"),
        ("/runs/bbbb2222", "Versions that led here"),
        ("/versions", "go on from aaaa1111:2"),
        ("/submit?like=aaaa1111", "Submit"),
    ],
)
def test_axe_finds_nothing_to_object_to(
    path: str, shown: str, chromium: Chromium, coordinator: Coordinator, axe: str
) -> None:
    fill(coordinator)
    chromium.open(path)
    chromium.see(shown)
    chromium.driver.execute_script(axe)
    found = chromium.driver.execute_async_script("axe.run().then(arguments[0])")
    assert {one["id"]: [node["html"] for node in one["nodes"]] for one in found["violations"]} == {}
    assert "color-contrast" in {one["id"] for one in found["passes"]}
