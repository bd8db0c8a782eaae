"""The web chat in a browser, as a researcher uses it; what a model or a user writes stays text."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.browser import Tab, launched, opened
from tests.serving.running import COOKIE, PASSWORD, Running
from tests.serving.test_streams import write_always

HOSTILE = (
    '<img src=x onerror="window.hit=1"><script>window.hit=1</script> [a](javascript:window.hit=1) '
    "[b](data:text/html,x) <a href='javascript:window.hit=1'>c</a> **bold** $x^2$ `<b>`\n\n"
    "```html\n<script>hit</script>\n```"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with launched(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def tab(server: Running, browser: Any) -> Iterator[Tab]:
    """Logged in as ada, without conversations."""
    server.service.conversations.delete("ada", None)
    with opened(browser) as tab:
        token = server.service.accounts.new_session("ada")
        browser.add_cookies([{"name": COOKIE, "value": token, "url": server.url}])
        tab.page.add_init_script("localStorage.setItem('dsv3-settings', '{\"max_tokens\": 20}')")
        tab.page.goto(server.url)
        tab.page.wait_for_selector("#log.empty")  # the script is ready
        yield tab
        assert tab.wrong == []
        assert tab.page.evaluate("window.hit") is None


def log_in(tab: Tab, password: str) -> None:
    tab.page.fill("#name", "ada")
    tab.page.fill("#password", password)
    tab.page.keyboard.press("Enter")


def ask(tab: Tab, text: str) -> None:
    tab.page.fill("#say", text)
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("#stop", state="visible")
    tab.page.wait_for_selector("#status:has-text('complete')", state="attached")  # and kept


def test_log_in_chat_and_log_out(server: Running, browser: Any) -> None:
    with opened(browser) as tab:
        tab.page.goto(server.url)
        assert tab.page.url.endswith("/login")
        log_in(tab, "wrong password")
        tab.page.wait_for_selector("text=wrong name or password")
        tab.wrong.clear()  # the browser reports the refusal
        log_in(tab, PASSWORD)
        tab.page.wait_for_selector("#account:has-text('ada')")
        tab.page.click("#open-account")
        tab.page.click("#log-out")
        tab.page.wait_for_selector("#login")
        assert tab.page.goto(server.url).url.endswith("/login")
        assert tab.wrong == []


def test_the_link_of_the_first_start_works_once(server: Running, browser: Any) -> None:
    for _ in range(2):
        with opened(browser) as tab:
            tab.page.goto(f"{server.url}/enter?token={server.token}")
            if tab.page.url.endswith("/"):
                tab.page.wait_for_selector("#account:has-text('local')")
                tab.page.click("#open-account")
                assert tab.page.is_hidden("#password-form")
                tab.page.click("#log-out")
                tab.page.wait_for_selector("#login")
            else:
                tab.page.wait_for_selector("text=used already")


def test_side_by_side_edit_regenerate_and_keep(server: Running, tab: Tab) -> None:
    page = tab.page
    page.check("#both")
    ask(tab, "def f(x):")
    names = page.locator(".answer h3").all_text_contents()
    assert names == ["one/seed1", "two/seed1"]
    first, second = page.locator(".answer .text").all_text_contents()
    assert first != second
    page.locator(".experts summary").first.click()
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".experts p:has-text('layer 1:')")
    assert page.locator(".answer .quiet").first.text_content().count("tokens/s") == 1
    ask(tab, "and then?")
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="Regenerate").first.click()
    page.wait_for_selector("#send", state="visible")
    assert page.locator(".turn").count() == 1, "what followed is asked anew"
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#say") == "def f(x):"
    ask(tab, "def g(x):")
    page.reload()
    page.locator("#conversations button.plain").click()
    page.wait_for_selector(".said:has-text('def g(x):')")
    assert page.locator(".answer").count() == 2
    page.get_by_role("button", name="Delete def g(x):").click()
    page.wait_for_selector("#none", state="visible")


def test_stop_keeps_what_came(server: Running, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    write_always(server, "ab", monkeypatch, end=stopped)
    page = tab.page
    page.click("#open-settings")
    page.fill("#drafts", "0")
    page.keyboard.press("Enter")
    page.fill("#say", "go on")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .text p:has-text('a')")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    stopped.set()
    page.wait_for_selector("#conversations button.plain")
    assert page.locator(".answer .text").text_content().strip() == "a"


def test_what_is_written_stays_text(server: Running, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    write_always(server, HOSTILE, monkeypatch)
    page = tab.page
    page.click("#open-settings")
    page.fill("#drafts", "0")
    page.fill("#max_tokens", "220")
    page.keyboard.press("Enter")
    ask(tab, HOSTILE[:30])
    page.wait_for_selector(".answer strong:has-text('bold')")
    assert page.locator(".answer math msup").count() == 1
    assert page.locator(".answer .code pre").text_content() == "<script>hit</script>"
    for forbidden in ("img", "script", "a"):
        assert page.locator(f"#log {forbidden}, #conversations {forbidden}").count() == 0
    assert page.locator(".said .text").text_content() == HOSTILE[:30]
    page.click("#tab-fill")
    page.click("#do-fill")
    page.wait_for_selector("#filled mark:has-text('onerror')")
    assert page.locator("#filled img").count() == 0


def test_the_page_cannot_read_text_as_html(tab: Tab) -> None:
    """The browser itself refuses it, should a later change of the page try."""
    refused = "() => { try { document.body.innerHTML = '<b>x</b>'; return 'read'; } catch (e) { return e.name; } }"
    assert tab.page.evaluate(refused) == "TypeError"
    tab.wrong.clear()


def test_gap_on_a_phone_by_keyboard(server: Running, tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    page.fill("#before", "def f(x):\n")
    page.fill("#after", "+ 1\n")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#filled .quiet:has-text('tokens/s')")
    assert page.locator("#filled pre").text_content().startswith("def f(x):\n")
    page.locator("#filled .experts summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"
    page.click("#menu")
    page.wait_for_selector("#new", state="visible")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    for landmark in ("banner", "navigation", "main"):
        assert page.get_by_role(landmark).count() == 1
    unlabelled = """[...document.querySelectorAll('button, input, select, textarea')].filter(e =>
        !e.textContent.trim() && !e.labels?.length && !e.ariaLabel && !e.ariaHidden)"""
    assert page.evaluate(f"{unlabelled}.length") == 0
