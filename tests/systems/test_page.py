"""The page at /, in headless Chromium (Debian's): what it shows is what the API says."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exported import SMALL, language_model, save_step
from playwright.sync_api import Browser, Page, sync_playwright
from serving import Server, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = language_model(dataclasses.replace(SMALL, num_layers=4))
    path = save_step(model, tmp_path_factory.mktemp("model") / "small.onnx", gates=True)
    with serving(path, "--max-tokens", "50000") as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """At /, complaining of anything that goes wrong in it, or goes elsewhere."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(server.url) else complaints.append(request.url))
    page.goto(server.url)
    page.wait_for_selector(".cell")
    yield page
    page.close()
    assert [each for each in complaints if not each.startswith("data:")] == []


def fill(page: Page, **values: Any) -> None:
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def run(page: Page) -> None:
    """Presses Continue and waits for the end of the stream."""
    runs = page.locator("#text").get_attribute("data-done") or "0"
    page.click("#go")
    page.wait_for_function(f"document.getElementById('text').dataset.done > {runs}")


def shown(page: Page) -> list[dict[str, Any]]:
    return page.eval_on_selector_all(
        "#text span",
        """spans => spans.map(span => ({text: span.textContent, bytes: span.dataset.bytes, bits: span.dataset.bits,
           prompt: span.classList.contains("prompt"), colour: getComputedStyle(span).backgroundColor,
           heat: Number(span.style.getPropertyValue("--heat"))}))""",
    )


def test_text_and_bits_are_the_api_s(page: Page, server: Server) -> None:
    fill(page, prompt="Ab é\n", length=60, temperature=0.9, seed=5)
    run(page)
    spans = shown(page)
    found = bytes.fromhex("".join(span["bytes"] for span in spans))
    prompt = "Ab é\n".encode()
    api = server.complete(
        prompt=[256, *prompt], max_tokens=60, temperature=0.9, seed=5, top_p=1, echo=True, logprobs=0
    )["choices"][0]
    tokens = api["logprobs"]["tokens"][1:]
    expected = bytes(int(t[8:], 16) if t.startswith("bytes:\\x") else ord(t) for t in tokens)
    assert found == expected
    assert found.startswith(prompt)
    assert b"".join(bytes.fromhex(s["bytes"]) for s in spans if s["prompt"]) == prompt
    bits = [float(each) for span in spans for each in span["bits"].split()]
    assert bits == pytest.approx([-x / math.log(2) for x in api["logprobs"]["token_logprobs"][1:]], abs=6e-4)
    assert [span["text"] for span in spans][:5] == ["A", "b", " ", "é", "\n"]
    assert f"{len(expected)} bytes, {sum(bits) / len(bits):.2f} bits each" in page.inner_text("#totals")

    # the more surprising, the more colour; and Chromium paints it
    for span in spans:
        each = [float(value) for value in span["bits"].split()]
        assert span["heat"] == pytest.approx(min(1, sum(each) / len(each) / 8), abs=2e-3)
    assert len({span["colour"] for span in spans}) > 10


def test_gates_are_shown_as_they_come(page: Page, server: Server) -> None:
    cells = page.locator(".cell")
    assert cells.count() == 16
    assert {cells.nth(k).get_attribute("title") for k in range(16)} == {"no step yet"}
    fill(page, prompt="x", length=5, temperature=0)
    run(page)
    gates = server.complete(prompt="x", max_tokens=5, temperature=0, gates=True)["choices"][0]["gates"][-1]

    def drawn() -> list[float]:
        return page.eval_on_selector_all(".cell", "cells => cells.map(c => Number(c.style.getPropertyValue('--gate')))")

    last = drawn()
    assert last == pytest.approx([g for row in gates for g in row], abs=1e-9)
    assert cells.nth(6).get_attribute("title") == f"layer 2 reads layer 3: {gates[1][2]:.3f}"
    page.hover("#text span >> nth=0")  # another step's
    assert drawn() != last
    assert "bits" in page.inner_text("#detail")
    assert page.locator("#text span.held").count() == 1


def test_stop_ends_it_on_the_server_too(page: Page, server: Server) -> None:
    fill(page, prompt="", length=50000)
    page.click("#go")
    page.wait_for_selector("#text span >> nth=20")
    page.click("#stop")
    page.wait_for_function("document.getElementById('text').dataset.done > 0")
    server.wait_until_idle()
    assert page.is_enabled("#go")
    assert page.locator("#text span").count() < 50000
    assert page.is_hidden("#error")


def test_keyboard_alone(page: Page) -> None:
    fill(page, length=8)
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_function("document.getElementById('text').dataset.done > 0")
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#text span").nth(1).get_attribute("class").split()[-1] == "held"


def test_errors_in_words_and_a_key(browser: Browser, tmp_path: Path) -> None:
    plain = save_step(language_model(), tmp_path / "plain.onnx")
    with serving(plain, "--api-key", "sesame", "--max-tokens", "50") as locked:
        page = browser.new_page()
        page.goto(locked.url)
        page.wait_for_selector("#key", state="visible")
        assert "Incorrect API key" in page.inner_text("#error")
        page.fill("#key", "sesame")
        page.keyboard.press("Tab")
        page.wait_for_function("document.getElementById('about').textContent.includes('plain')")
        assert page.is_hidden("#error")
        assert "--gates" in page.inner_text("#mapnote")  # how to get a model that shows them
        assert page.is_hidden("#map")
        fill(page, length=51)
        run(page)
        assert "max_tokens is 51; at most 50" in page.inner_text("#error")
        fill(page, length=50)
        run(page)
        assert page.is_hidden("#error")
        page.close()


def test_fits_a_telephone(browser: Browser, server: Server) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(server.url)
    fill(page, length=80, prompt="long" * 30)
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
