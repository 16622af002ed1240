"""The page in a real browser: no console message, no request, search and selection work.

Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import models
import rewrite
from benchmarks import _browser
from rewrite.equivalence.side_by_side import side_by_side
from rewrite.html.pages import verification_page
from rewrite.runtime.inputs import Inputs

selenium = pytest.importorskip("selenium")
pytestmark = pytest.mark.skipif(not _browser.installed(), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with _browser.headless() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a ResNet-18 whose folded form has one planted error."""
    model = models.randomize_norms_(torchvision.models.resnet18()).eval()
    x = torch.randn(1, 3, 48, 48)
    wrong = copy.deepcopy(rewrite.convert(model, "fold", example_inputs=x, verify=False).model)
    with torch.no_grad():
        wrong.layer2[0].conv1.weight[3] *= 1.5
    found = rewrite.verify(model, wrong, x, level="quick")
    text = verification_page(found, side_by_side(model, wrong, Inputs.of(x))).render()
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def opened(browser: Any, page: Path) -> Any:
    _browser.opened(browser, page)
    return browser


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def shown(browser: Any, selector: str) -> list[Any]:
    return [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]


def test_no_console_message_and_no_request(browser: Any, page: Path) -> None:
    opened(browser, page)
    assert browser.get_log("browser") == []
    asked = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert all(
        f'"url":"{page.as_uri()}"' in message or '"url":"data:' in message for message in asked
    )


def test_a_planted_error_is_seen_without_scrolling(browser: Any, page: Path) -> None:
    opened(browser, page)
    height = browser.execute_script("return window.innerHeight")
    for element in (find(browser, "h1"), find(browser, "#divergence dd")):
        assert element.is_displayed() and element.location["y"] + element.size["height"] < height
    assert find(browser, "#divergence dd").text == "layer2.0.conv1"


def test_the_search_finds_modules_by_name_and_class(browser: Any, page: Path) -> None:
    opened(browser, page)
    find(browser, "#search").send_keys("layer3.1.conv2")
    assert find(browser, "#found").text == "1 module found"
    names = {row.get_attribute("data-name") for row in shown(browser, "#after .row")}
    assert "layer3.1.conv2" in names and "layer1.0.conv1" not in names
    find(browser, "#search").clear()
    find(browser, "#search").send_keys("no such module")
    assert find(browser, "#found").text == "0 modules found"


def test_only_what_is_off_can_be_shown(browser: Any, page: Path) -> None:
    opened(browser, page)
    find(browser, "#only").click()
    names = {row.get_attribute("data-name") for row in shown(browser, "#after .row")}
    assert "layer2.0.conv1" in names and "layer1.0.conv1" not in names


def test_a_module_shows_its_readers_on_both_sides(browser: Any, page: Path) -> None:
    opened(browser, page)
    find(browser, "#expand").click()
    find(browser, '#before .row[data-name="layer1.0.conv1"]').click()
    assert find(browser, "#detail-name").text == "layer1.0.conv1"
    assert len(shown(browser, ".row.linked")) == 2
    assert "layer1.0.bn1" in find(browser, "#graph").text


def test_the_page_works_by_keyboard(browser: Any, page: Path) -> None:
    opened(browser, page)
    row = find(browser, '#after .row[data-name="conv1"]')
    row.send_keys("\ue007")
    assert find(browser, "#detail-name").text == "conv1"


def test_it_is_usable_in_two_seconds(browser: Any, page: Path) -> None:
    assert 0 < _browser.opened(browser, page) < 2000
