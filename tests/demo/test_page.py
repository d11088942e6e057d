"""The demo's page in a real browser, with the real command in a separate process."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("There is no Chromium on this machine (Debian: apt install chromium).", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`).")
pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`).")

pytestmark = pytest.mark.slow  # takes a minute in a browser

# A fake microphone with a hum and a fake camera with a test picture, both with permission.
FAKE_DEVICES = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKE_DEVICES])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(base_folder, clip, tmp_path_factory):
    """The command in a separate process: its address and its upload folder."""
    uploads, examples = tmp_path_factory.mktemp("uploads"), tmp_path_factory.mktemp("examples")
    shutil.copyfile(clip, examples / "a.mp4")
    turns = [("user", "hello there"), ("assistant", "how are you"), ("user", "i am fine thanks")]
    lines = [{"dialogue_id": "d", "turn": turn, "speaker": who, "text": text} for turn, (who, text) in enumerate(turns)]
    lines[2]["video"] = "a.mp4"
    (examples / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-u", "-m", "empathic.cli", "demo", base_folder, "--compare", base_folder]
    options = ["--max_new_tokens", "120", "--max_seconds", "5", "--max_upload_mb", "0.5", "--examples", str(examples)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(uploads)}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)
    line = ""
    while not (address := re.search(r"http://\S+", line)):
        line = process.stdout.readline()
        assert line, "the server ended"
    yield address[0], uploads
    process.kill()
    process.wait(30)
    process.stdout.close()


def open_page(browser, url, **options):
    """A visitor's page, and the errors in it."""
    page, problems = browser.new_context(**options).new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if is_outside(request.url, url) else None)
    page.goto(url)
    page.wait_for_selector("#text textarea")
    return page, problems


def is_outside(address, url):
    return not address.startswith((url, url.replace("127.0.0.1", "localhost"), "data:", "blob:"))


def say(page, text, turns):
    """Send a text with the Enter key and wait until the page has this many turns."""
    page.fill("#text textarea", text)
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.querySelectorAll('#past .turn').length === n", arg=turns)
    page.wait_for_selector("#stop:disabled")


def add_clip(page, path):
    if not page.is_visible("#clip"):
        page.click("#media > button")
    page.set_input_files("#clip input[type=file]", path)


def said(page):
    return page.locator("#past .turn .said").all_inner_texts()


def test_a_visitor_talks_compares_and_takes_the_conversation_along(server, browser, clip, tmp_path):
    url, uploads = server
    page, problems = open_page(browser, url)
    # The reply is streamed: record every state that the page shows.
    page.evaluate(
        """() => { window.states = new Set(); new MutationObserver(() => {
            const answer = document.querySelector("#now .answer.writing p");
            if (answer) states.add(answer.innerText);
        }).observe(document.getElementById("conversation"), { childList: true, subtree: true }) }"""
    )
    say(page, "hello there", 1)
    reply = page.inner_text("#past .answer p")
    # A busy browser may show few of the states.
    assert any(text and text != reply and reply.startswith(text) for text in page.evaluate("[...states]"))
    assert page.locator("#past .bars li").count() == 0  # this model names no emotion from text alone
    add_clip(page, clip)
    page.wait_for_selector("#clip video")
    page.get_by_label("without voice and face").check()
    page.get_by_label("without memory").check()
    say(page, "how <b>are</b> ${you}", 2)
    assert said(page)[1] == "how <b>are</b> ${you}\n\nwith voice and face"
    second = page.locator("#past .turn").nth(1)
    assert second.locator(".bars li").count() == 7 and second.locator(".bars li.best").count() == 1
    percents = [int(text.split()[0]) for text in second.locator(".bars .value").all_inner_texts()]
    assert 96 <= sum(percents) <= 104
    assert "2 memory vectors" in second.locator(".cost").inner_text()
    labels = second.locator(".label").all_inner_texts()
    assert [label.split(" · ")[0].split(", ")[-1] for label in labels[1:]] == [
        "without voice and face",
        "without memory",
    ]
    assert page.locator("#clip video").count() == 0 and [p for p in uploads.rglob("*") if p.is_file()] == []
    # Retry and edit change the last turn only, which keeps its clip.
    page.get_by_label("without voice and face").uncheck()
    page.get_by_label("without memory").uncheck()
    page.click("#retry")
    page.wait_for_function("document.querySelectorAll('#past .turn:nth-child(2) .answer').length === 1")
    page.wait_for_selector("#retry:enabled")
    page.click("#edit")
    page.wait_for_function("document.querySelector('#text textarea').value.startsWith('how')")
    say(page, "what did he say", 2)
    page.wait_for_selector("#past .said:has-text('what did he say')")
    assert said(page) == ["hello there", "what did he say\n\nwith voice and face"]
    with page.expect_download() as download:
        page.click("#save")
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    assert [turn["text"] for turn in json.loads(file.read_text())["turns"]] == ["hello there", "what did he say"]
    # A new visit starts without a conversation; the file restores it, and it continues.
    replies = page.locator("#past .answers").all_inner_texts()
    page.reload()
    page.wait_for_selector("#past .empty")
    with page.expect_file_chooser() as chooser:
        page.click("#load")
    chooser.value.set_files(file)
    page.wait_for_function("document.querySelectorAll('#past .turn').length === 2")
    assert page.locator("#past .answers").all_inner_texts() == replies
    say(page, "i am fine", 3)
    assert "4 memory vectors" in page.locator("#past .cost").last.inner_text()
    page.click("#clear")
    page.wait_for_selector("#past .empty")
    assert problems == []
    page.context.close()


def test_two_visitors_and_their_mistakes(server, browser, clip, tmp_path, write_media, tone):
    url, uploads = server
    one, _ = open_page(browser, url)
    two, _ = open_page(browser, url)
    say(one, "hello there", 1)
    say(two, "the old dog", 1)
    assert said(one) == ["hello there"] and said(two) == ["the old dog"]
    # Each mistake gets a message, and the next turn works.
    one.fill("#text textarea", "a" * 100_000)
    one.click("#send")
    one.wait_for_selector("#notice .error:has-text('100,000 characters')")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(clip).read_bytes()[:3000])
    long = write_media(tmp_path / "long.wav", samples=tone(20, 8000), sampling_rate=8000, audio_codec="pcm_s16le")
    large = tmp_path / "large.mp4"
    with open(large, "wb") as file:
        file.truncate(2 << 30)
    add_clip(one, broken)
    one.wait_for_selector("#clip video")
    one.fill("#text textarea", "hello")
    one.click("#send")
    one.wait_for_selector("#notice .error:has-text('cut short')")
    assert one.input_value("#text textarea") == "hello"
    add_clip(one, large)
    one.wait_for_selector(r"text=/exceed the maximum allowed size of 488\.3 Kb: .large\.mp4/")
    one.click("#voice button[aria-label*=pload]")
    one.set_input_files("#voice input[type=file]", long)
    one.wait_for_selector("#voice .component-wrapper, #voice audio, #voice [data-testid*=waveform]", state="attached")
    one.click("#send")
    one.wait_for_selector("#notice .error:has-text('20 s long; the limit is 5 s')")
    say(one, "how are you", 2)
    assert one.locator("#notice .error").count() == 0 and said(two) == ["the old dog"]
    assert [path for path in uploads.rglob("*") if path.is_file()] == []
    for page in (one, two):
        page.context.close()


def test_stop_with_the_keyboard(server, browser):
    page, problems = open_page(browser, server[0])
    say(page, "hello there", 1)
    page.fill("#text textarea", "how are you")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:enabled")
    page.keyboard.press("Escape")
    page.wait_for_selector("#notice:has-text('Stopped')")
    assert said(page) == ["hello there"] and page.input_value("#text textarea") == "how are you"
    say(page, "how are you", 2)
    assert "2 memory vectors" in page.locator("#past .cost").last.inner_text() and problems == []
    page.context.close()


def box(page):
    return page.input_value("#text textarea")


def wait_for_box(page, text):
    page.wait_for_function("text => document.querySelector('#text textarea').value === text", arg=text)


def test_a_draft_survives_stop_and_edit(server, browser):
    page, problems = open_page(browser, server[0])
    say(page, "hello there", 1)
    for compared in page.locator("#compare input").all():  # so that there is time to stop
        compared.check()
    page.fill("#text textarea", "how are you")
    # Once the reply is being written and what was sent has left the box, write something and press Escape.
    page.evaluate(
        """() => { const timer = setInterval(() => {
            const box = document.querySelector("#text textarea");
            if (document.querySelector("#stop").disabled || box.value) return;
            clearInterval(timer);
            box.value = "my draft";
            box.dispatchEvent(new Event("input", { bubbles: true }));
            box.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
        }, 5) }"""
    )
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice:has-text('Stopped')")
    wait_for_box(page, "how are you\nmy draft")
    for compared in page.locator("#compare input").all():
        compared.uncheck()
    page.fill("#text textarea", "my draft")
    page.click("#edit")
    wait_for_box(page, "hello there")
    page.click("#edit")
    wait_for_box(page, "my draft")
    page.click("#edit")
    wait_for_box(page, "hello there")
    page.fill("#text textarea", "how are you")
    page.click("#send")
    page.wait_for_selector("#past .said:has-text('how are you')")
    wait_for_box(page, "my draft")
    page.wait_for_selector("#edit:has-text('Edit'):not(:has-text('Don'))")
    page.reload()  # as after a restart of the server
    page.wait_for_selector("#past .empty")
    wait_for_box(page, "my draft")
    assert problems == []
    page.context.close()


def test_an_example_and_clear_lose_nothing(server, browser):
    page, problems = open_page(browser, server[0])
    say(page, "how are you", 1)
    assert page.locator("#undo").is_disabled()
    page.fill("#text textarea", "my draft")
    page.click("#example input")
    page.click("ul[role=listbox] li")
    page.wait_for_selector("#notice:has-text('your text stays')")
    assert box(page) == "my draft" and said(page) == ["hello there"]
    page.click("#undo")
    page.wait_for_selector("#past .said:has-text('how are you')")
    assert said(page) == ["how are you"] and box(page) == "my draft" and page.locator("#undo").is_disabled()
    page.click("#clear")
    page.wait_for_selector("#past .empty")
    wait_for_box(page, "")
    page.click("#undo")
    wait_for_box(page, "my draft")
    assert said(page) == ["how are you"]
    say(page, "what did he say", 2)  # the conversation goes on where it was
    assert "2 memory vectors" in page.locator("#past .cost").last.inner_text() and problems == []
    page.context.close()


def test_an_example_with_its_clip(server, browser):
    page, problems = open_page(browser, server[0])
    for _ in range(2):  # twice, because the clip of an example must not be deleted with the uploads
        page.click("#example input")
        page.click("ul[role=listbox] li")
        page.wait_for_selector("#clip video")
        assert said(page) == ["hello there"]
        page.wait_for_function("document.querySelector('#text textarea').value === 'i am fine thanks'")
        page.click("#send")
        page.wait_for_function("document.querySelectorAll('#past .turn').length === 2")
        page.wait_for_selector("#clear:enabled")
        assert said(page)[1] == "i am fine thanks\n\nwith voice and face"
        assert page.locator("#past .bars li").count() == 7
        page.click("#clear")
        page.wait_for_selector("#past .empty")
    assert problems == []
    page.context.close()


def test_voice_from_a_microphone(server, browser):
    page, problems = open_page(browser, server[0])
    page.click("#media > button")
    page.click("#voice button:has-text('Record')")
    page.wait_for_timeout(1500)
    with page.expect_response(lambda response: "/run/predict" in response.url):  # the server has processed the upload
        page.click("#voice button:has-text('Stop')")
    page.wait_for_selector("#voice .component-wrapper, #voice audio, #voice [data-testid*=waveform]", state="attached")
    say(page, "hello there", 1)
    assert said(page) == ["hello there\n\nwith voice"] and page.locator("#past .bars li").count() == 7
    assert problems == []
    page.context.close()


def test_a_recording_of_the_webcam(server, browser):
    page, problems = open_page(browser, server[0])
    page.click("#media > button")
    page.click("#clip button[aria-label='Capture from camera']")
    page.click("#clip button:has-text('Webcam')")
    page.wait_for_selector("#clip video")
    page.wait_for_timeout(1500)  # the camera starts
    page.click("#clip button:has-text('Record')")
    page.wait_for_timeout(3000)  # a busy browser's recording of one second may have no frame
    with page.expect_response(lambda response: "/run/predict" in response.url):  # the server has processed the upload
        page.click("#clip button:has-text('Stop')")
    page.wait_for_selector("#clip video")
    say(page, "hello there", 1)
    assert said(page) == ["hello there\n\nwith voice and face"] and page.locator("#past .bars li").count() == 7
    assert page.locator("#past .answer p").inner_text() and problems == []
    page.context.close()


def test_a_clip_goes_with_its_visitor(server, browser, clip):
    url, uploads = server
    page, _ = open_page(browser, url)
    before = set(uploads.rglob("*"))  # the clip of an example may be there
    with page.expect_response(lambda response: "/run/predict" in response.url):  # the clip's owner is recorded
        add_clip(page, clip)
    page.wait_for_selector("#clip video")
    assert [path.name for path in set(uploads.rglob("*")) - before if path.is_file()] == ["clip.mp4"]
    page.context.close()
    for _ in range(300):
        if set(uploads.rglob("*")) == before:
            break
        time.sleep(0.1)
    assert set(uploads.rglob("*")) == before


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (360, "dark")])
def test_it_fits_and_follows_the_colours_of_the_system(server, browser, width, scheme):
    options = dict(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page, problems = open_page(browser, server[0], **options)
    say(page, "hello" * 200, 1)
    page.click("#media > button")
    page.wait_for_selector("#clip")
    over = """[...document.querySelectorAll('#conversation *, #say *, #tools *, #compare *')].filter((each) =>
        each.getClientRects().length && each.getBoundingClientRect().right > innerWidth + 0.5)
        .map((each) => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(over) == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    grey = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", grey)[0])
    assert (red < 60) == (scheme == "dark"), grey
    said, answers = (page.locator(f"#past {name}").bounding_box() for name in (".said", ".answers"))
    read = page.locator("#past .read").bounding_box()
    assert (read["x"] > said["x"] + said["width"] - 1) == (width > 640) and answers["y"] > said["y"]
    assert problems == []
    page.context.close()
