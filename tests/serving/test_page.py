"""The page at / in a real browser: pictures are dropped on it, and results are shown."""

import os
from pathlib import Path

import pytest

from ov3fast.serving.options import Options

from . import browser
from .conftest import noise, running

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium"),
]
DROP = """
(() => {
  const transfer = new DataTransfer();
  for (const [name, kind, data] of FILES) transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type: kind}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
})()
"""


def drop(page, *files) -> None:
    """files: (name, bytes) each, dropped on the page."""
    import base64
    import json

    listed = [(name, f"image/{Path(name).suffix[1:]}", base64.b64encode(data).decode()) for name, data in files]
    page.run(DROP.replace("FILES", json.dumps(listed)))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_pictures_are_dropped_and_shown(page, server, photos, tmp_path):
    page.open(f"http://127.0.0.1:{server.port}/")
    page.until("document.getElementById('model').textContent.includes('ready')")
    assert "tiny, 32 px" in page.run("document.getElementById('model').textContent")
    page.run("document.getElementById('texts').value = 'a red square\\nred\\n\\na'")
    drop(page, photos[0], ("broken.png", b"no picture"))
    page.until("document.querySelectorAll('article[data-done]').length === 2")
    expected = server.form("/similarity", photos[:1], ["a red square", "red", "a"]).json()["images"][0]["nearest"]
    rows = page.run(
        "[...document.querySelectorAll('article:last-child li')].map(li => [...li.querySelectorAll('span')].map(s => s.textContent))"
    )
    assert rows == [[near["text"], f"{near['score']:.3f}"] for near in expected]
    caption = server.form("/caption", photos[:1]).json()["images"][0]["caption"] or "(no words)"
    assert page.run("document.querySelector('article:last-child .caption').textContent") == caption
    labels = page.run("[...document.querySelectorAll('article:last-child figcaption')].map(c => c.textContent)")
    psnr = server.form("/reconstruct", photos[:1]).json()["images"][0]["psnr"]
    assert labels == ["original", f"reconstruction, {psnr:.1f} dB"]
    assert page.run("[...document.querySelectorAll('article:last-child img')].every(i => i.complete && i.naturalWidth > 0)")
    assert "not an image that Pillow can identify" in page.run(
        "document.querySelector('article:first-child .error').textContent"
    )
    assert not page.console, page.console
    if place := os.environ.get("OV3FAST_SCREENSHOTS"):
        Path(place).mkdir(parents=True, exist_ok=True)
        Path(place, "page.png").write_bytes(page.screenshot())


def test_files_are_chosen_and_names_are_text(page, server, tmp_path):
    file = tmp_path / "<img src=x onerror=alert(1)>.png"
    noise(3, 40, 40).save(file)
    page.open(f"http://127.0.0.1:{server.port}/")
    page.until("document.getElementById('model').textContent.includes('ready')")
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    chosen = page.call("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=chosen, files=[str(file)])
    page.until("document.querySelectorAll('article[data-done]').length === 1")
    assert page.run("document.querySelector('h2').textContent") == file.name
    assert page.run("document.querySelectorAll('h2 img').length") == 0


def test_a_key_is_asked_for(page, model, photos):
    with running(model, Options(api_key="secret", max_batch=1)) as client:
        page.open(f"http://127.0.0.1:{client.port}/")
        page.until("document.getElementById('model').textContent.includes('ready')")
        drop(page, photos[0])
        page.until("document.querySelectorAll('article[data-done]').length === 1")
        assert "X-API-Key" in page.run("document.querySelector('.error').textContent")
        page.run("document.getElementById('key').value = 'secret'")
        drop(page, photos[0])
        page.until("document.querySelectorAll('article[data-done]').length === 2")
        assert page.run("document.querySelectorAll('article:first-child figure').length") == 2


def test_the_description_of_the_interface(page, server):
    page.open(f"http://127.0.0.1:{server.port}/docs")
    page.until("document.querySelectorAll('section').length >= 7")
    assert "POST /encode" in page.run("document.body.textContent") and not page.console
    if place := os.environ.get("OV3FAST_SCREENSHOTS"):
        Path(place, "docs.png").write_bytes(page.screenshot())
