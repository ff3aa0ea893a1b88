"""The server's page, in a headless Chromium.

MATFORMER_SCREENSHOTS=DIR keeps pictures of it.
"""

import os
import pathlib
import re
import shutil

from fake_engine import served
import pytest

import matformer_jax
from matformer_jax.serving.service import Settings

CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def model(tiny_run):
  return matformer_jax.load(tiny_run)


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as running:
    browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


def opened(browser, url, **context):
  """A page without errors, and whose requests all go to the server."""
  page = browser.new_context(**context).new_page()
  page.problems = []
  page.on("pageerror", lambda e: page.problems.append(str(e)))
  page.on("request", lambda r: r.url.startswith(url) or page.problems.append(r.url))
  page.goto(url)
  return page


def picture(page, name):
  directory = os.environ.get("MATFORMER_SCREENSHOTS")
  if directory:
    page.screenshot(path=pathlib.Path(directory) / f"{name}.png", full_page=True)


@pytest.mark.slow
def test_the_page(browser, model):
  with served(model, step_s=0.03, max_length=300) as (engine, _, url):
    page = opened(browser, url, viewport={"width": 900, "height": 800})
    expect(page).to_have_title("tiny")
    slider = page.get_by_label("Size")
    assert slider.get_attribute("max") == "4" and slider.get_attribute("aria-valuetext") == "auto"
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "M"
    page.get_by_label("Prompt").fill("<b>def</b> f(")
    page.get_by_label("New tokens, at most").fill("60")
    page.get_by_role("button", name="Generate").click()
    text, status = page.get_by_role("region", name="Text"), page.get_by_role("status")
    expect(status).to_have_text(re.compile(r"^M, .* parameters · \d\d tokens"))
    lengths = [len(text.inner_text())]
    picture(page, "streaming")
    expect(page.get_by_role("status")).to_have_text(re.compile("done$"))
    lengths.append(len(text.inner_text()))
    assert lengths[0] < lengths[1]  # it streamed
    prompt = engine.model.tokenizer.prompt("<b>def</b> f(")
    new = [engine.token(prompt, i) for i in range(60)]
    want = "<b>def</b> f(" + engine.model.tokenizer.continuation(prompt, new)
    assert text.evaluate("e => e.textContent") == want
    assert " 60 tokens " in status.inner_text() and "tokens/s" in status.inner_text()
    picture(page, "done")
    # Stopped, it frees the slot; auto says who answered.
    slider.press("Home")
    page.get_by_label("New tokens, at most").fill("250")
    page.get_by_role("button", name="Generate").click()
    expect(status).to_have_text(re.compile("^XL, "))
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text(re.compile("stopped$"))
    # A mistake is told.
    page.get_by_label("New tokens, at most").fill("299")
    page.get_by_role("button", name="Generate").click()
    expect(status).to_have_text(re.compile("299 more are asked for"))
    assert not page.problems
    unlabelled = page.evaluate(
      "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length"
    )
    assert unlabelled == 0
    dark = opened(browser, url, color_scheme="dark", viewport={"width": 380, "height": 760})
    expect(dark).to_have_title("tiny")
    assert dark.evaluate("document.documentElement.scrollWidth") <= 380
    ground = "getComputedStyle(document.body).backgroundColor"
    assert dark.evaluate(ground) != page.evaluate(ground)
    picture(dark, "dark")


@pytest.mark.slow
def test_the_page_asks_for_a_key(browser, model):
  with served(model, Settings("tiny", api_key="secret")) as (_, _, url):
    page = opened(browser, url)
    key = page.get_by_label("API key")
    key.wait_for()
    key.fill("secret")
    key.press("Enter")
    expect(page.get_by_role("status")).to_have_text(re.compile("done$"))
    assert page.title() == "tiny" and not page.problems
    picture(page, "key")
