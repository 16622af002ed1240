"""The page in a real browser: no console message, no request, search and selection work.

Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

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
    torch.manual_seed(0)
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


def test_the_first_divergence_is_chosen_and_open_on_both_sides(browser: Any, page: Path) -> None:
    opened(browser, page)
    assert find(browser, "#detail-name").text == "layer2.0.conv1"
    assert "layer2.0.conv1" in find(browser, "#graph").text
    for side in ("before", "after"):
        assert shown(browser, f'#{side} .row[data-name="layer2.0.conv1"].linked')
        assert not shown(browser, f'#{side} .row[data-name="layer1.0.conv1"]')


def test_the_chart_names_modules_and_is_as_wide_as_the_page(browser: Any, page: Path) -> None:
    for width in (390, 1280):
        browser.set_window_size(width, 900)
        opened(browser, page)
        script = "return document.querySelector('#chart svg').getBoundingClientRect().width"
        wide = browser.execute_script("return document.querySelector('#chart').clientWidth")
        assert abs(browser.execute_script(script) - wide) < 1
        box = "return document.querySelector('#chart svg').getAttribute('viewBox')"
        assert browser.execute_script(box) == f"0 0 {wide} 240"  # letters keep their size
        assert find(browser, "#chart").text.split()[0] == "conv1"
    assert shown(browser, "#chart .limit")


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


def media(browser: Any, **features: str) -> None:
    """Show the page as on another medium: media="print", or prefers_color_scheme="dark"."""
    given = {"media": features.pop("media", "")}
    named = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {**given, "features": named})


def contrast(browser: Any, selector: str) -> float:
    """Return the contrast of a text to the page, as WCAG 2 defines it."""
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"

    def luminance(css: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", css)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = luminance(browser.execute_script(script, selector, "color"))
    paper = luminance(browser.execute_script(script, "body", "backgroundColor"))
    return (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(browser: Any, page: Path, scheme: str) -> None:
    media(browser, prefers_color_scheme=scheme)
    opened(browser, page)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    for selector in ("h1", "h2", ".kicker", ".kind", "#after .row .name", "th"):
        assert contrast(browser, selector) >= 4.5, selector
    media(browser)


def test_on_paper_there_are_no_controls_and_nothing_is_cut_off(browser: Any, page: Path) -> None:
    opened(browser, page)
    find(browser, "#expand").click()
    style = "return getComputedStyle(document.querySelector('#after'))[arguments[0]]"
    assert browser.execute_script(style, "overflowY") == "auto"
    assert find(browser, ".tools").is_displayed()
    media(browser, media="print")
    assert browser.execute_script(style, "overflowY") == "visible"
    assert browser.execute_script(style, "maxHeight") == "none"
    assert shown(browser, ".tools") == [] and find(browser, "#divergence dd").is_displayed()
    media(browser)


def test_a_screen_reader_hears_what_colours_say(browser: Any, page: Path) -> None:
    opened(browser, page)
    found = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    heard = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in found
        if not node["ignored"]
    ]
    names = [name for _, name in heard]
    assert any("layer2.0.conv1, Conv2d" in n and "largest error" in n for n in names)
    assert ("group", "Original") in heard and ("group", "Rewritten") in heard
    assert any(role == "heading" and "does not hold" in name for role, name in heard)
    assert any(role == "searchbox" and name.startswith("Search") for role, name in heard)
    roles = ("button", "link", "searchbox", "textbox", "checkbox", "combobox", "image", "img")
    assert [role for role, name in heard if role in roles and not name.strip()] == []


def test_tab_goes_through_the_controls_in_the_order_in_which_they_stand(
    browser: Any, page: Path
) -> None:
    opened(browser, page)
    met = []
    for _ in range(5):
        browser.switch_to.active_element.send_keys("\ue004")
        met.append(browser.switch_to.active_element.get_attribute("id"))
    assert met[:4] == ["search", "only", "expand", "collapse"]


def test_a_chosen_module_is_said_to_be_pressed_and_a_branch_opens_by_keyboard(
    browser: Any, page: Path
) -> None:
    opened(browser, page)
    row = find(browser, '#after .row[data-name="conv1"]')
    assert row.get_attribute("aria-pressed") == "false"
    row.send_keys("\ue007")
    assert row.get_attribute("aria-pressed") == "true"
    branch = find(browser, '#before details details:has(> summary > .row[data-name="layer1"])')
    closed = branch.get_attribute("open")
    browser.execute_script("arguments[0].focus()", branch.find_element("css selector", "summary"))
    browser.switch_to.active_element.send_keys(" ")
    assert branch.get_attribute("open") != closed


_HOSTILE = (
    "<script>window.ran = 1</script>", '"><img src=x onerror="window.ran = 1">', "'quoted'",
    "</script><script>window.ran = 1</script>", "{{ 7 * 7 }}", "<!--", "名前", "\u202ebackwards",
    "two\nlines", "n" * 4000,
)  # fmt: skip


class Hostile(nn.Module):
    """Modules whose names are markup, code of templates, unusual or long."""

    def __init__(self) -> None:
        super().__init__()
        for name in _HOSTILE:
            self._modules[name] = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self._modules.values():
            x = module(x)  # type: ignore[misc]
        return x


def test_names_are_text_whatever_is_in_them(browser: Any, tmp_path: Path) -> None:
    model, x = models.randomize_norms_(Hostile()).eval(), torch.randn(1, 2, 3, 3)
    result = rewrite.convert(model, "fold", example_inputs=x)
    place = tmp_path / "page.html"
    place.write_text(result.report.to_html(model, result.model, x), encoding="utf-8")
    opened(browser, place)
    find(browser, "#expand").click()
    names = {row.get_attribute("data-name") for row in shown(browser, "#after .row")}
    assert set(_HOSTILE) < names
    for side in ("before", "after"):  # what a click on each row does
        script = "document.querySelectorAll(`#${arguments[0]} .row`).forEach((row) => row.click())"
        browser.execute_script(script, side)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.ran") is None
    assert browser.find_elements("css selector", "main img, main script") == []
    width = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(width) <= 0


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_without_sites_or_without_a_run_says_so(
    browser: Any, tmp_path: Path, width: int
) -> None:
    browser.set_window_size(width, 900)
    none = rewrite.convert(nn.Linear(2, 2).eval(), "fold", example_inputs=torch.randn(1, 2))
    chain = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    unverified = rewrite.convert(chain, "fold", verify=False)
    for result, verdict in ((none, "Nothing was rewritten"), (unverified, "nothing is verified")):
        place = tmp_path / "page.html"
        place.write_text(result.report.to_html(), encoding="utf-8")
        opened(browser, place)
        assert verdict in find(browser, "h1").text
        assert browser.get_log("browser") == []
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(overflow) <= 0
    browser.set_window_size(1280, 900)
