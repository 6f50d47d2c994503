"""The page in a real browser: what a person does with it, and what must never happen on it.

Each test fails on a console error, on a page error, and on a request to another origin.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.server.live import Live, live_server

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
expect.set_options(timeout=30_000)

CODE = "def add(a, b):\n    return"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((p for n in names if (p := shutil.which(n))), None)
    if path is None:
        script = Path(__file__).parents[2] / "scripts" / "find_browser.sh"
        path = subprocess.run(
            [script], check=True, text=True, stdout=subprocess.PIPE
        ).stdout.strip()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server of fixed draft lengths: whether drafting pays here and now is not what is tested."""
    with live_server("--spec-draft-n", "3") as server:
        yield server


@dataclass
class Watch:
    """What a page did that it must not."""

    origin: str
    faults: list[str] = field(default_factory=list)
    forgiven: tuple[str, ...] = ()

    def console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def request(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:", f"blob:{self.origin}")):
            self.faults.append(f"request: {request.url}")

    def check(self) -> None:
        left = [f for f in self.faults if not any(re.search(p, f) for p in self.forgiven)]
        assert not left


def open_page(browser: Browser, url: str, **options: object) -> tuple[Page, Watch]:
    context = browser.new_context(**options)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(20_000)
    watch = Watch(url)
    page.on("console", watch.console)
    page.on("pageerror", lambda error: watch.faults.append(f"page: {error}"))
    page.on("request", watch.request)
    page.goto(url + "/")
    expect(page.locator("#server-state")).to_have_text("ready")
    return page, watch


@pytest.fixture
def page(browser: Browser, live: Live) -> Iterator[Page]:
    opened, watch = open_page(browser, live.url)
    yield opened
    opened.context.close()
    watch.check()


def choose(page: Page, name: str, value: str) -> None:
    page.locator(f"input[name={name}][value={value}]").check(force=True)


def settings(page: Page, **values: object) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#settings [name={name}]").fill(str(value))
    page.locator("#settings button[value=save]").click()


def send(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Page) -> None:
    expect(page.locator("#stop")).to_be_disabled()


def test_a_message_streams_and_each_token_tells_who_chose_it(page: Page) -> None:
    settings(page, max_tokens=48)
    choose(page, "mode", "continue")
    send(page, CODE)
    ended(page)
    tokens = page.locator(".answer .tok")
    assert tokens.count() > 8
    assert page.locator(".answer .tok.drafted").count() > 0
    tokens.first.hover()
    expect(page.locator("#tip")).to_contain_text("probability")
    expect(page.locator(".answer footer")).to_contain_text("tokens/s")


def test_the_keyboard_alone_sends_and_reads_probabilities(page: Page) -> None:
    settings(page, max_tokens=16)
    expect(page.locator("#settings")).not_to_be_visible()
    page.locator("#prompt").focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    ended(page)
    page.locator(".answer .body").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text("probability")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tok.current").count() == 1


def test_stop_ends_the_answer_and_keeps_what_came(page: Page) -> None:
    settings(page, max_tokens=2000)
    choose(page, "mode", "continue")
    choose(page, "drafting", "off")
    send(page, CODE)
    expect(page.locator(".answer .tok").nth(5)).to_be_attached()
    page.click("#stop")
    ended(page)
    expect(page.locator(".answer footer")).to_contain_text("stopped")
    assert page.locator(".answer .tok").count() < 2000


def test_compare_shows_the_same_text_and_the_factor(page: Page) -> None:
    settings(page, max_tokens=64)
    choose(page, "mode", "continue")
    choose(page, "drafting", "compare")
    send(page, CODE)
    expect(page.locator(".verdict")).to_contain_text("The same text")
    expect(page.locator(".verdict")).to_contain_text("× the speed of plain decoding")
    left, right = page.locator(".pair .answer .body").all_text_contents()
    assert left == right
    assert page.locator(".pair .answer").nth(1).locator(".tok.drafted").count() == 0
    page.get_by_role("button", name="Replay side by side").click()


def test_compare_of_sampled_text_is_the_same_text(page: Page) -> None:
    settings(page, max_tokens=40, temperature=1)
    choose(page, "drafting", "compare")
    send(page, "Tell me something.")
    expect(page.locator(".verdict")).to_contain_text("The same text")


def test_the_modem_table_for_2368_characters(page: Page) -> None:
    rows = page.evaluate(
        "async () => (await import('/js/modem.js')).table(2368).map((r) => [r.name, r.time])"
    )
    assert rows == [
        ["300", "1m 19s"],
        ["1200", "19.7 s"],
        ["2400", "9.9 s"],
        ["14.4K", "1.6 s"],
        ["33.6K", "705 ms"],
        ["56K", "447 ms"],
    ]


def test_the_modem_view_replays_the_answer(page: Page) -> None:
    settings(page, max_tokens=48)
    choose(page, "mode", "continue")
    send(page, CODE)
    ended(page)
    text = page.locator(".answer .body").text_content()
    page.get_by_role("button", name="Modem view").click()
    expect(page.locator("#modem-table tbody tr")).to_have_count(7)
    slow = page.locator("#modem-terminals pre").nth(1)  # 300 bit/s: 30 characters a second
    assert len(slow.text_content() or "") < len(text or "")
    page.click("#modem-end")
    for screen in page.locator("#modem-terminals pre").all():
        assert screen.text_content() == text
    page.click("#modem-close")
    expect(page.locator("#modem")).not_to_be_visible()


def test_a_reload_keeps_conversations_and_settings(page: Page) -> None:
    settings(page, max_tokens=12)
    send(page, "Keep this")
    ended(page)
    text = page.locator(".answer .body").text_content()
    page.reload()
    expect(page.locator(".answer .body")).to_have_text(text or "")
    assert page.locator(".answer .tok").count() > 0
    page.get_by_role("button", name="Settings").click()
    assert page.locator("#settings [name=max_tokens]").input_value() == "12"
    page.locator("#settings button[value=cancel]").click()
    page.get_by_role("button", name="Delete Keep this").click()
    expect(page.locator(".answer")).to_have_count(0)


def test_export_gives_the_conversation(page: Page) -> None:
    settings(page, max_tokens=8)
    send(page, "Export this")
    ended(page)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export JSON").click()
    chat = json.loads(Path(waiting.value.path()).read_text())
    assert chat["turns"][0]["text"] == "Export this"
    assert chat["turns"][1]["runs"][0]["text"]
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export Markdown").click()
    assert "Export this" in Path(waiting.value.path()).read_text()


def test_gauges_show_what_drafting_does(page: Page) -> None:
    settings(page, max_tokens=64)
    choose(page, "mode", "continue")
    send(page, CODE)
    ended(page)
    expect(page.locator("#g-rate")).not_to_have_text("–")
    expect(page.locator("#g-per-pass")).not_to_have_text("–")
    expect(page.locator("#g-acceptance > div").first).to_contain_text("%")


def test_model_output_is_never_html(page: Page) -> None:
    """As rendered text and as tokens; a fence, a link and an image stay text."""
    harmful = "<img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](http://x/y.png)"
    found = page.evaluate(
        """async (text) => {
          const { render } = await import('/js/markdown.js');
          const { Answer, newRun } = await import('/js/chat.js');
          const run = { ...newRun('auto', 'm'), text, tokens: [[text, 1, 0.5, 0]], finish: 'stop' };
          const box = document.createElement('div');
          box.append(...render(text), new Answer(run, { view: 'tokens' }).element,
            new Answer(run, { view: 'text' }).element);
          return [box.querySelectorAll('img, a, script').length, box.textContent];
        }""",
        harmful,
    )
    assert found[0] == 0
    assert found[1].count("onerror=alert(1)") == 3


def test_an_error_of_the_server_is_shown_with_its_reason(browser: Browser, live: Live) -> None:
    page, watch = open_page(browser, live.url)
    watch.forgiven = ("status of 400",)  # the browser itself notes every answer that is an error
    page.evaluate("localStorage.setItem('outdraft.settings', JSON.stringify({max_tokens: -5}))")
    page.reload()
    expect(page.locator("#server-state")).to_have_text("ready")
    send(page, "Hello")
    expect(page.locator(".answer .problem")).to_contain_text("max_tokens")
    ended(page)
    page.context.close()
    watch.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 800)], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(
    browser: Browser, live: Live, scheme: str, size: tuple[int, int]
) -> None:
    width, height = size
    opened, watch = open_page(
        browser, live.url, color_scheme=scheme, viewport={"width": width, "height": height}
    )
    settings(opened, max_tokens=40)
    choose(opened, "mode", "continue")
    choose(opened, "drafting", "compare")
    send(opened, CODE)
    expect(opened.locator(".verdict")).to_contain_text("The same text")
    serious = []
    found = Axe().run(opened).response["violations"]
    opened.get_by_role("button", name="Modem view").first.click()
    opened.click("#modem-end")
    found += Axe().run(opened).response["violations"]
    opened.click("#modem-close")
    opened.get_by_role("button", name="Settings").click()
    found += Axe().run(opened).response["violations"]
    for violation in found:
        if violation["impact"] in ("serious", "critical"):
            nodes = [n["html"][:200] for n in violation["nodes"]]
            serious.append((violation["id"], violation["help"], nodes))
    assert not serious
    # nothing is wider than the screen
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.context.close()
    watch.check()


def test_a_server_that_is_gone_is_said_and_found_again(browser: Browser) -> None:
    with live_server() as first:
        opened, watch = open_page(browser, first.url)
        watch.forgiven = ("net::ERR_", "Failed to load resource")
        settings(opened, max_tokens=2000)
        choose(opened, "mode", "continue")
        send(opened, CODE)
        expect(opened.locator(".answer .tok").nth(5)).to_be_attached()
        first.process.kill()
    expect(opened.locator("#banner")).to_contain_text("does not answer")
    expect(opened.locator(".answer .problem")).to_be_visible()
    ended(opened)
    kept = opened.locator(".answer .tok").count()
    assert kept > 5
    opened.click("#banner-retry")
    expect(opened.locator("#banner")).to_contain_text("does not answer")
    with live_server(port=first.port):  # the page looks again by itself
        expect(opened.locator("#server-state")).to_have_text("ready")
        expect(opened.locator("#banner")).not_to_be_visible()
        assert opened.locator(".answer .tok").count() == kept
        opened.context.close()
    watch.check()


@pytest.mark.parametrize("width,height", [(320, 640), (390, 844)])
def test_a_phone_has_room_for_the_conversation(
    browser: Browser, live: Live, width: int, height: int
) -> None:
    """Nothing is wider than the screen, and what was written last is in sight."""
    opened, watch = open_page(
        browser, live.url, viewport={"width": width, "height": height}, is_mobile=True
    )

    def wide() -> int:
        found: int = opened.evaluate(
            "[...document.querySelectorAll('body *')].filter("
            "e => e.getBoundingClientRect().right > innerWidth + 1).length"
        )
        return found

    settings(opened, max_tokens=40)
    choose(opened, "drafting", "compare")
    send(opened, "hello " + "x" * 120)
    ended(opened)
    expect(opened.locator(".verdict")).to_be_in_viewport(ratio=0.9)
    log = opened.locator("#log").bounding_box()
    assert log is not None and log["height"] > 0.5 * height
    assert wide() == 0
    for button in ("#open-gauges", "#open-history"):
        opened.click(button)
        assert wide() == 0
        opened.click(button)
    opened.get_by_role("button", name="Modem view").first.click()
    assert wide() == 0
    opened.context.close()
    watch.check()


@pytest.mark.prove
def test_pictures_for_the_docs(browser: Browser, live: Live) -> None:
    """Screenshots of the page as it is; `make prove` writes them anew."""
    for name, scheme, size in (
        ("page-desktop-light", "light", (1360, 860)),
        ("page-desktop-dark", "dark", (1360, 860)),
        ("page-phone", "light", (390, 800)),
    ):
        width, height = size
        opened, watch = open_page(
            browser, live.url, color_scheme=scheme, viewport={"width": width, "height": height}
        )
        settings(opened, max_tokens=160)
        choose(opened, "mode", "continue")
        choose(opened, "drafting", "auto" if name == "page-phone" else "compare")
        send(opened, "def read_lines(path):\n    with open(path) as")
        ended(opened)
        opened.screenshot(path=PICTURES / f"{name}.png")
        if name == "page-desktop-light":
            opened.get_by_role("button", name="Modem view").first.click()
            opened.wait_for_timeout(1500)
            opened.screenshot(path=PICTURES / "page-modem.png")
        opened.context.close()
        watch.check()
