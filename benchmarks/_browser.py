"""A headless Chromium (Debian: chromium, chromium-driver) for pages that this toolkit writes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

_FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync",
    "disable-component-update", "no-first-run", "disable-quic", "hide-scrollbars",
)  # fmt: skip


def installed() -> bool:
    """Say whether both the browser and its driver are here."""
    return BROWSER is not None and DRIVER is not None


@contextmanager
def headless(size: tuple[int, int] = (1280, 900)) -> Iterator[Any]:
    """Yield a driver whose console and network are logged."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*_FLAGS, f"window-size={size[0]},{size[1]}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def opened(driver: Any, page: Path) -> float:
    """Open a page that works from its file, and return the milliseconds until it was usable."""
    driver.get(page.resolve().as_uri())
    script = (
        "return document.body.dataset.ready === 'true' "
        "? performance.getEntriesByType('navigation')[0].loadEventEnd : -1"
    )
    spent = float(driver.execute_script(script))
    if spent < 0:
        raise RuntimeError(f"{page}: the page's script did not come to its end")
    return spent
