"""A browser without a window, and the questions that tests ask of the page in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
DRIVER = "chromedriver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60
"""Seconds until a page that does nothing has failed."""


def find_browser() -> str | None:
    """The path of Chromium or Chrome; None unless its driver is there, too."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found if shutil.which(DRIVER) else None


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a profile and a port of its own, so that several can run at once."""
    options = webdriver.ChromeOptions()
    options.binary_location = find_browser() or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """A page that :func:`figures.explore.explore_page` has written, in a browser.

    Args:
        size: width and height of the window, in pixels.
        scheme: what the reader's system prefers, ``light`` or ``dark``.
    """

    def __init__(
        self, driver: webdriver.Chrome, file: Path, size: tuple[int, int] = (1280, 800), scheme: str = "light"
    ) -> None:
        self.driver, self.file = driver, file
        self.resize(*size)
        self.prefer(scheme)
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        driver.get(file.as_uri())
        # Else a mouse that an earlier test has left over the page would point at a patch.
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 1, "y": 1})
        self.settle()

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Let the reader's system prefer another scheme."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def processor_time(self) -> float:
        """Seconds that the page's main thread has computed since it was opened."""
        (time,) = (
            metric["value"]
            for metric in self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            if metric["name"] == "ThreadTime"
        )
        return time

    def until(self, condition: str, *args: Any) -> Any:
        """Wait until a JavaScript expression of `args[0]`, ... is true; its value."""
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda driver: self.js(condition, *args), condition)

    def js(self, expression: str, *args: Any) -> Any:
        return self.driver.execute_script(f"const args = arguments; return {expression}", *args)

    def settle(self) -> None:
        """Wait until every figure shows what it should."""
        # the browser tells of a new size or scheme with its next frame
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        self.until("document.getElementById('panels').ariaBusy === 'false'")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def figure(self, name: str, panel: int = 0) -> str:
        """A JavaScript expression: the element of a figure's plot."""
        return f"document.querySelectorAll('.panel')[{panel}].querySelector('.{name} .plot')"

    def values(self, name: str, panel: int = 0) -> list[list[float]]:
        """What a heat map shows."""
        self.settle()
        return self.js(f"{self.figure(name, panel)}.data[0].z")

    def plot(self, name: str, panel: int = 0) -> WebElement:
        return self.js(self.figure(name, panel))

    def small_pictures(self, name: str, count: int, grid: tuple[int, int]) -> list[list[list[float]]]:
        """What each of the small pictures of a figure shows."""
        (height, width), values = grid, self.values(name)
        columns = (len(values[0]) + 1) // (width + 1)
        corners = [(place // columns * (height + 1), place % columns * (width + 1)) for place in range(count)]
        return [[line[left : left + width] for line in values[top : top + height]] for top, left in corners]

    def frames(self, name: str, panel: int = 0, dash: str = "solid") -> list[list[float]]:
        """The [row, column] of each cell of a heat map that is framed."""
        self.settle()
        shapes = self.js(f"{self.figure(name, panel)}.layout.shapes")
        found = [shape for shape in shapes if shape["line"]["color"] == "black" and shape["line"]["dash"] == dash]
        return [[(shape["y0"] + shape["y1"]) / 2, (shape["x0"] + shape["x1"]) / 2] for shape in found]

    def text(self, selector: str, panel: int = 0) -> str:
        """Of the first such element of a panel, or of the page if it has an id."""
        self.settle()
        root = "document" if selector.startswith("#") else f"document.querySelectorAll('.panel')[{panel}]"
        return self.js(f"{root}.querySelector('{selector}').textContent")

    def point(self, name: str, row: float, column: float, shape: tuple[int, int], panel: int = 0) -> ActionChains:
        """Move the mouse to a cell of a heat map of `shape` cells."""
        area = self.js(f"{self.figure(name, panel)}.querySelector('.nsewdrag')")
        box = self.js("(({width, height}) => [width, height])(args[0].getBoundingClientRect())", area)
        # Selenium counts from the element's centre
        x, y = (
            size * ((place + 0.5) / count - 0.5)
            for size, place, count in zip(box, (column, row), shape[::-1], strict=True)
        )
        chain = ActionChains(self.driver).move_to_element_with_offset(area, round(x), round(y))
        chain.perform()
        return chain

    def click(self, name: str, row: float, column: float, shape: tuple[int, int], panel: int = 0) -> None:
        self.point(name, row, column, shape, panel).click().perform()

    def click_small(self, name: str, place: int, count: int, grid: tuple[int, int]) -> None:
        """Click on one of the small pictures of a figure."""
        self.settle()
        edges = "(({ x, y }) => [x, y])(args[0].data[0])"
        x, y = self.js(edges, self.plot(name))
        columns = len(x) // (grid[1] + 1)
        row, column = divmod(place, columns)
        shape = self.js("[args[0].layout.yaxis.range[0], args[0].layout.xaxis.range[1]]", self.plot(name))
        at = [y[row * (grid[0] + 1)] + grid[0] / 2, x[column * (grid[1] + 1)] + grid[1] / 2]
        self.click(name, at[0] - 0.5, at[1] - 0.5, shape)

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()
        self.settle()
