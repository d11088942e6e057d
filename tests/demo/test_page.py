"""The demo's page in a real browser, with the real command in a separate process."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("There is no Chromium on this machine (Debian: apt install chromium).", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`).")
pytest.importorskip("fastapi", reason="FastAPI is not installed (extra `demo`).")

pytestmark = pytest.mark.slow  # takes minutes in a browser

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    # A fake microphone with a beep and a fake camera with a test picture, both with permission.
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
EMOTIONS = 7
# Records what the page speaks, because a browser without a screen has no voices.
SPEECH = """
window.spoken = [];
Object.defineProperty(window, "speechSynthesis", { value: {
  cancel() {},
  speak(utterance) {
    spoken.push({ text: utterance.text, rate: utterance.rate, pitch: utterance.pitch });
    setTimeout(() => utterance.onend(), 50);
  },
} });
"""


class Command:
    """`empathic demo` in a separate process, on a port of its own."""

    def __init__(self, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.options = options
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self):
        command = [sys.executable, "-u", "-m", "empathic.cli", "demo", *self.options, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = ""
        while "http://" not in line:
            line = self.process.stdout.readline()
            assert line, "the server ended"

    def kill(self):
        self.process.kill()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def driver():
    with playwright.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(driver):
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def examples(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    shutil.copyfile(clip, folder / "a.mp4")
    turns = [("user", "hello there"), ("assistant", "how are you"), ("user", "i am fine thanks")]
    lines = [{"dialogue_id": "d", "turn": turn, "speaker": who, "text": text} for turn, (who, text) in enumerate(turns)]
    lines[2]["video"] = "a.mp4"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def server(base_folder, examples):
    limits = ("--max_new_tokens", "30", "--max_seconds", "8", "--max_upload_mb", "0.5")
    command = Command(
        base_folder, "--compare", base_folder, "--compare_name", "before EPO", "--examples", str(examples), *limits
    )
    yield command
    command.kill()


@pytest.fixture(scope="module")
def slow_server(base_folder, tmp_path_factory):
    """A server whose replies are long, so that there is time to stop them."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    command = Command(str(folder), "--max_new_tokens", "6000")
    yield command
    command.kill()


def open_page(browser, server, script=None, context=None, **options):
    """A visitor's page, and the errors in it: exceptions, failed requests, and requests to elsewhere."""
    context = context or browser.new_context(**options)
    page, problems = context.new_page(), []
    page.set_default_timeout(60_000)
    if script:
        page.add_init_script(script)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if is_outside(request.url, server.url) else None)
    page.goto(server.url)
    page.wait_for_selector("body[data-ready]")
    return page, problems


def is_outside(address, url):
    return not address.startswith((url, "data:", "blob:"))


def wait_for_end(page, turns):
    """Wait until the page has this many turns and none is in progress."""
    page.wait_for_function("n => document.querySelectorAll('.turn').length === n", arg=turns)
    page.wait_for_selector("#send[aria-label=Send]")


def say(page, text, turns):
    """Send a text with the Enter key and wait for the reply."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    wait_for_end(page, turns)


def begin(page, text):
    """Send a text and wait for the first word of the reply."""
    before = page.locator(".turn").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_function("n => document.querySelectorAll('.turn').length === n", arg=before + 1)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.reply .cost')].at(-1).textContent.includes('first word')"
    )


def add_clip(page, path):
    before = page.locator("#attachments li").count()
    page.set_input_files("#file", path)
    page.wait_for_function("n => document.querySelectorAll('#attachments li').length > n", arg=before)


def said(page):
    return page.locator(".said .bubble").all_inner_texts()


def replies(page):
    return page.locator(".reply .bubble").all_inner_texts()


def box(page):
    return page.input_value("#text")


def memory(page):
    """The memory vectors and text tokens that the meter shows."""
    return tuple(map(int, re.findall(r"\d+", page.inner_text("#meter-text"))))


def check_option(page, identifier, value=True):
    page.click("#menu-button")
    page.set_checked(f"#{identifier}", value)
    page.keyboard.press("Escape")
    page.wait_for_selector("#menu:not(:popover-open)", state="attached")


# ------------------------------------------------------------------ a conversation


def test_a_visitor_talks_with_text_and_a_clip(server, browser, clip):
    page, problems = open_page(browser, server)
    assert page.locator("#cards video").count() == 1 and page.is_visible("#empty")
    # The reply is streamed: record every state that the page shows.
    page.evaluate(
        """() => { window.states = new Set(); new MutationObserver(() => {
            const reply = document.querySelector(".reply .bubble");
            if (reply) states.add(reply.innerText);
        }).observe(document.getElementById("turns"), { childList: true, subtree: true, characterData: true }) }"""
    )
    say(page, "hello there", 1)
    reply = replies(page)[0]
    assert any(text and text != reply and reply.startswith(text) for text in page.evaluate("[...states]"))
    assert not page.is_visible(".feeling")  # nothing for text alone
    assert re.fullmatch(r"first word after \d+\.\d\d s · \d+\.\d\d s", page.inner_text(".reply .cost"))
    vectors, tokens = memory(page)
    assert vectors == 2 and tokens > 2
    add_clip(page, clip)
    say(page, "how are you", 2)
    assert page.locator(".turn").nth(1).locator(".said video").count() == 1
    assert page.evaluate("document.querySelector('.said video').src").startswith("blob:")
    page.wait_for_function("() => document.querySelector('.said video').duration > 0.5")  # it can be played
    feeling = page.locator(".turn").nth(1).locator(".feeling")
    name, share = re.fullmatch(r"(\w+) (\d+) %", feeling.inner_text()).groups()
    assert not page.locator(".bars").nth(1).is_visible()
    feeling.click()
    titles = page.locator(".bars .title").all_inner_texts()
    assert titles == ["voice and face together", "voice alone", "face alone"]
    bars = page.locator(".bars > div").first
    assert bars.locator("li").count() == EMOTIONS and bars.locator("li.best").inner_text().split() == [name, share, "%"]
    percents = [int(text.split()[0]) for text in bars.locator(".value").all_inner_texts()]
    assert 96 <= sum(percents) <= 104
    more = memory(page)
    assert more[0] == 4 and more[1] > tokens
    assert problems == []
    page.context.close()


def test_markdown_is_shown_and_html_is_not(server, browser):
    page, problems = open_page(browser, server)
    text = "# Title\n**bold** *soft* `code` <img src=x onerror=alert(1)> <b>x</b>\n\n- one\n- two\n\n3. three\n\n"
    text += "> quote\n\n```\n<script>alert(1)</script>\n```\n\n"
    text += "[good](https://example.org/a) [bad](javascript:alert(1)) ${y}"
    page.fill("#text", text)
    page.press("#text", "Enter")
    wait_for_end(page, 1)
    bubble = page.locator(".said .bubble")
    for selector, content in (
        ("h3", "Title"), ("strong", "bold"), ("em", "soft"), ("p code", "code"), ("ul li:first-child", "one"),
        ("ol[start='3'] li", "three"), ("blockquote", "quote"), ("pre code", "<script>alert(1)</script>"),
    ):  # fmt: skip
        assert bubble.locator(selector).first.inner_text() == content, selector
    assert (
        bubble.locator("img, script, b").count() == 0 and "<img src=x onerror=alert(1)> <b>x</b>" in bubble.inner_text()
    )
    assert (
        bubble.locator("a").all_inner_texts() == ["good"] and "[bad](javascript:alert(1)) ${y}" in bubble.inner_text()
    )
    assert bubble.locator("a").get_attribute("rel") == "noopener noreferrer"
    # Long texts of the worst kinds come to an end, and say what they said.
    read = """async (part) => { const { markdown } = await import("./static/markdown.js");
        return markdown(part.repeat(5000)).map((each) => each.textContent).join("").length; }"""
    for part, length in (("[", 5000), ("`[", 5000), ("**a ", 20_000), ("_a", 10_000), ("[a](", 20_000)):
        assert length - 3 <= page.evaluate(read, part) <= 4 * 5000
    assert problems == []
    page.context.close()


def test_the_clip_decides_and_the_columns_show_it(server, browser, clip):
    page, problems = open_page(browser, server)
    page.click("#menu-button")
    assert page.locator("#columns label").all_inner_texts() == [
        "without voice and face",
        "without memory",
        "before EPO",
    ]
    for column in page.locator("#columns input").all():
        column.check()
    page.keyboard.press("Escape")
    say(page, "hello there", 1)
    assert replies(page)[1] == "The same as this model: your message has no voice and no face."
    add_clip(page, clip)
    say(page, "how are you", 2)
    turn = page.locator(".turn").nth(1)
    names = ["this model", "without voice and face", "without memory", "before EPO"]
    assert turn.locator(".column").all_inner_texts() == names
    shown = turn.locator(".reply .bubble").all_inner_texts()
    assert all(shown) and shown[0] == shown[3]  # the same checkpoint
    assert len({shown[0], shown[1], shown[2]}) > 1
    places = [reply.bounding_box() for reply in turn.locator(".reply").all()]
    assert len({place["y"] for place in places}) == 1 and len({place["x"] for place in places}) == 4
    # Only the first column is remembered.
    assert memory(page)[0] == 4
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator(".turn").nth(1).locator(".reply .bubble").all_inner_texts() == shown
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(200)
    strip = page.locator(".replies").nth(1)
    widths = strip.evaluate("each => [each.scrollWidth, each.clientWidth]")
    assert widths[0] > 3 * widths[1] and page.evaluate("document.documentElement.scrollWidth") <= 390
    strip.evaluate("each => { each.scrollLeft = each.clientWidth * 0.8; }")
    page.wait_for_timeout(500)
    left = strip.locator(".reply").nth(1).bounding_box()["x"] - strip.bounding_box()["x"]
    assert abs(left) < 3  # the swipe ends at a column
    assert problems == []
    page.context.close()


def test_retry_and_edit_can_be_undone(server, browser, clip):
    page, problems = open_page(browser, server)
    say(page, "hello there", 1)
    add_clip(page, clip)
    say(page, "how are you", 2)
    say(page, "i am fine", 3)
    before = replies(page)
    page.fill("#text", "my draft")
    page.locator("button[aria-label='Edit your message']").nth(1).click()
    assert box(page) == "how are you" and page.locator("#attachments video").count() == 1
    assert page.is_visible("#editing")
    page.click("#cancel-edit")
    assert box(page) == "my draft" and page.locator("#attachments video").count() == 0
    page.locator("button[aria-label='Edit your message']").nth(1).click()
    page.fill("#text", "what did he say")
    page.press("#text", "Enter")
    wait_for_end(page, 2)
    assert said(page) == ["hello there", "what did he say"] and box(page) == "my draft"
    assert page.locator(".turn").nth(1).locator(".said video").count() == 1
    page.click("#undo")
    assert said(page) == ["hello there", "how are you", "i am fine"] and replies(page) == before
    assert box(page) == "my draft" and memory(page)[0] == 6
    page.locator("button[aria-label='Answer again']").nth(2).click()
    wait_for_end(page, 3)
    assert replies(page)[:2] == before[:2] and page.evaluate("document.activeElement.title") == "Answer again"
    page.click("#undo")
    assert replies(page) == before and problems == []
    page.context.close()


def test_copying_a_message(server, browser):
    page, problems = open_page(browser, server, permissions=["clipboard-read", "clipboard-write"])
    say(page, "hello **there**", 1)
    page.click("button[aria-label='Copy your message']")
    page.wait_for_selector("#notice:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "hello **there**"
    page.click("button[aria-label='Copy this reply']")
    page.wait_for_function("() => navigator.clipboard.readText().then((text) => !text.startsWith('hello **'))")
    assert problems == []
    page.context.close()


# ------------------------------------------------------------------ waiting and stopping


def test_stop_keeps_what_was_said_and_what_is_being_written(slow_server, browser):
    page, problems = open_page(browser, slow_server)
    for number, stops in enumerate(("key", "button"), 1):
        begin(page, "hello there")
        page.fill("#text", "my draft")
        if stops == "key":
            page.keyboard.press("Escape")
        else:
            page.click("#send[aria-label=Stop]")
        wait_for_end(page, number)
        reply = replies(page)[-1]
        assert reply.endswith("Stopped here.") and len(reply) > 20 and box(page) == "my draft"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert replies(page)[-1] == reply and box(page) == "my draft"
    # The partial reply is a part of the history.
    begin(page, "how are you")
    page.keyboard.press("Escape")
    wait_for_end(page, 3)
    assert problems == []
    page.context.close()


def test_a_reload_in_the_middle_of_a_reply_keeps_what_came(slow_server, browser):
    page, _ = open_page(browser, slow_server)
    begin(page, "hello there")
    page.wait_for_timeout(1500)  # the page saves once a second
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert said(page) == ["hello there"] and replies(page)[0].endswith("Stopped here.") and len(replies(page)[0]) > 20
    page.context.close()


def test_those_who_wait_see_it(slow_server, browser):
    one, _ = open_page(browser, slow_server)
    two, problems = open_page(browser, slow_server)
    begin(one, "hello there")
    two.fill("#text", "the old dog")
    two.press("#text", "Enter")
    two.wait_for_selector(".stage:has-text('Waiting: one turn is before yours')")
    assert "Waiting: one turn is before yours" in two.inner_text("#status")
    one.keyboard.press("Escape")
    two.wait_for_selector(".reply .cost:has-text('first word')")
    two.keyboard.press("Escape")
    wait_for_end(two, 1)
    wait_for_end(one, 1)
    assert said(one) == ["hello there"] and said(two) == ["the old dog"] and problems == []
    begin(one, "hello there")
    two.fill("#text", "hello")
    two.press("#text", "Enter")
    two.wait_for_selector(".stage:has-text('Waiting')")
    two.keyboard.press("Escape")  # before the first word
    two.wait_for_selector(".reply:has-text('Stopped before the first word')")
    one.keyboard.press("Escape")
    for page in (one, two):
        page.context.close()


def test_the_stages_of_a_turn_with_a_clip_are_shown(server, browser, clip):
    page, problems = open_page(browser, server)
    page.evaluate(
        """() => { window.stages = []; new MutationObserver(() => {
            const text = document.getElementById("status").textContent;
            if (text && stages.at(-1) !== text) stages.push(text);
        }).observe(document.getElementById("status"), { childList: true, subtree: true, characterData: true }) }"""
    )
    add_clip(page, clip)
    page.press("#text", "Enter")
    wait_for_end(page, 1)
    page.wait_for_function("() => stages.some((text) => text.startsWith('Reply: '))")
    stages = page.evaluate("stages")
    assert stages[:3] == ["Listening …", "Watching …", "Answering …"] and stages[-1] == f"Reply: {replies(page)[0]}"
    assert problems == []
    page.context.close()


# ------------------------------------------------------------------ nothing is lost


def test_a_conversation_survives_a_restart_of_the_server(base_folder, browser, clip):
    server = Command(base_folder, "--max_new_tokens", "20")
    try:
        page, problems = open_page(browser, server)
        say(page, "hello there", 1)
        add_clip(page, clip)
        say(page, "how are you", 2)
        page.fill("#text", "my draft")
        before = (said(page), replies(page), memory(page))
        server.kill()
        page.press("#text", "Enter")
        page.wait_for_selector(".problem:has-text('The server cannot be reached')")
        problems.clear()
        server.start()
        page.click(".turn:last-child button[aria-label='Answer again']")
        page.wait_for_function("() => !document.querySelector('.problem')")
        wait_for_end(page, 3)
        assert said(page)[2] == "my draft" and memory(page)[0] == 6
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert said(page)[:2] == before[0] and replies(page)[:2] == before[1] and memory(page)[0] == 6
        page.wait_for_function("() => document.querySelector('.said video').duration > 0.5")  # the clip is there too
        assert page.locator(".feeling:visible").count() == 1 and problems == []
        # The clip is sent again.
        page.locator("button[aria-label='Answer again']").nth(1).click()
        wait_for_end(page, 2)
        assert page.locator(".problem").count() == 0
        page.context.close()
    finally:
        server.kill()


def test_new_and_examples_can_be_undone(server, browser):
    page, problems = open_page(browser, server)
    say(page, "how are you", 1)
    before = replies(page)
    page.fill("#text", "my draft")
    page.click("#new")
    assert page.is_visible("#empty") and box(page) == "" and page.evaluate("document.activeElement.id") == "text"
    page.click("#cards button")
    page.wait_for_selector("#attachments video")
    assert said(page) == ["hello there"] and box(page) == "i am fine thanks"
    page.click("#new")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.click("#undo")  # also after a reload
    assert said(page) == ["hello there"] and box(page) == "i am fine thanks"
    page.wait_for_selector("#attachments video")
    page.press("#text", "Enter")
    wait_for_end(page, 2)
    assert page.locator(".feeling:visible").count() == 1
    page.click("#new")
    page.fill("#text", "my draft")
    page.click("#cards button")
    page.wait_for_selector("#notice:has-text('your text stays')")
    assert box(page) == "my draft" and said(page) == ["hello there"]
    page.click("#undo")
    assert said(page) == [] and box(page) == "my draft" and before and problems == []
    page.context.close()


def test_files_keep_a_conversation(server, browser, clip, tmp_path):
    page, problems = open_page(browser, server)
    say(page, "hello there", 1)
    add_clip(page, clip)
    say(page, "how are you", 2)
    before = (said(page), replies(page))
    page.click("#menu-button")
    with page.expect_download() as download:
        page.click("#save")
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    record = json.loads(file.read_text())
    assert [turn["text"] for turn in record["turns"]] == ["hello there", "how are you"]
    assert record["memory"]["vectors"] == 4 and len(record["memory"]["digest"]) == 32
    page.context.close()
    page, problems = open_page(browser, server)
    page.set_input_files("#load-file", file)
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 2")
    assert replies(page) == before[1] and said(page)[1].endswith("how are you") and "no longer kept" in said(page)[1]
    assert page.locator(".feeling:visible").count() == 1 and memory(page)[0] == 4
    say(page, "i am fine", 3)
    assert memory(page)[0] == 6
    page.locator("button[aria-label='Answer again']").nth(1).click()
    page.wait_for_selector("#notice.error:has-text('no longer kept')")
    answer = {"label": "x", "text": "b", "seconds": 1.0, "memory_vectors": 0, "history_tokens": 0}
    turn = {"text": "a", "shown": [], "emotions": None, "emotion_seconds": None, "answers": [answer]}
    old = {"empathic_conversation": 1, "turns": [turn]}  # as the page wrote it before

    def load(content):
        path = tmp_path / "other.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        page.evaluate("document.getElementById('notice-text').textContent = ''")
        page.set_input_files("#load-file", path)
        page.wait_for_function("() => document.getElementById('notice-text').textContent !== ''")
        return page.inner_text("#notice-text")

    assert "1 turns is loaded" in load(old) and said(page) == ["a"] and replies(page) == ["b"]
    for content, message in (
        ("", "it is not JSON"),
        ("[]", "not a conversation saved by this page"),
        ({**old, "turns": [turn] * 1001}, "at most 1000 turns"),
        ({**old, "turns": [{**turn, "answers": []}]}, "damaged"),
        ({**old, "turns": [{**turn, "text": ["a"]}]}, "damaged"),
        ({**old, "turns": [{**turn, "answers": [{**answer, "seconds": "soon"}]}]}, "damaged"),
        ({**old, "turns": [{**turn, "answers": [{**answer, "text": "a" * 40_000}]}]}, "damaged"),
        ({**old, "turns": [{**turn, "emotions": {"happy": "<b>"}}]}, "damaged"),
    ):
        assert message in load(content), content
    assert said(page) == ["a"] and problems == []
    page.context.close()


def test_the_browser_forgets_on_request(server, browser, clip):
    page, problems = open_page(browser, server)
    say(page, "hello there", 1)
    page.fill("#text", "my draft")
    check_option(page, "speak")
    page.click("#menu-button")
    page.click("#forget")
    page.wait_for_selector("#notice:has-text('keeps nothing')")
    left = """async () => [localStorage.length, await new Promise((resolve) => {
        const request = indexedDB.open("empathic");
        request.onsuccess = () => {
            const all = request.result.transaction("conversations").objectStore("conversations").getAll();
            all.onsuccess = () => resolve(all.result.length);
        };
    })]"""
    assert page.evaluate(left) == [0, 0] and box(page) == "" and page.is_visible("#empty")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.is_visible("#empty") and problems == []
    page.context.close()


def test_visitors_and_tabs_have_conversations_of_their_own(server, browser):
    one, _ = open_page(browser, server)
    two, _ = open_page(browser, server)
    say(one, "hello there", 1)
    say(two, "the old dog", 1)
    assert said(one) == ["hello there"] and said(two) == ["the old dog"]
    tab, _ = open_page(browser, server, context=one.context)
    assert said(tab) == []  # the other tab has the conversation
    say(tab, "how are you", 1)
    one.reload()
    one.wait_for_selector("body[data-ready]")
    assert said(one) == ["hello there"]
    one.close()
    later, _ = open_page(browser, server, context=tab.context)
    assert said(later) == ["hello there"] and said(tab) == ["how are you"]
    for page in (two, tab):
        page.context.close()


def test_mistakes_get_a_message_and_nothing_is_lost(server, browser, clip, tmp_path, write_media, tone):
    page, _ = open_page(browser, server)
    page.press("#text", "Enter")
    page.wait_for_selector("#notice.error:has-text('Say something first')")
    page.fill("#text", "a" * 100_000)
    page.click("#send")
    page.wait_for_selector("#notice.error:has-text('100,000 characters; the limit is 4,000')")
    assert len(box(page)) == 100_000
    large, text, broken = (tmp_path / name for name in ("large.mp4", "a.txt", "broken.mp4"))
    large.write_bytes(b"a" * 600_000)
    text.write_text("hello")
    broken.write_bytes(Path(clip).read_bytes()[:3000])
    for path, message in ((large, "0.6 MB; the limit is 0.5 MB"), (text, "no sound and no video")):
        page.set_input_files("#file", path)
        page.wait_for_selector(f"#notice.error:has-text('{message}')")
    add_clip(page, broken)
    page.fill("#text", "hello")
    page.click("#send")
    page.wait_for_selector(".problem:has-text('cut short')")
    long = write_media(tmp_path / "long.wav", samples=tone(20, 8000), sampling_rate=8000, audio_codec="pcm_s16le")
    page.click("button[aria-label='Edit your message']")
    assert box(page) == "hello" and page.locator("#attachments li").count() == 1
    page.click("#attachments button[aria-label='Remove this clip']")
    add_clip(page, long)
    page.click("#send")
    page.wait_for_selector(".problem:has-text('20 s long; the limit is 8 s')")
    say(page, "how are you", 2)  # what failed is not a part of the history
    assert memory(page)[0] == 2
    page.context.close()


# ------------------------------------------------------------------ live


def test_the_camera_shows_the_emotion_and_send_takes_the_recording(server, browser):
    page, problems = open_page(browser, server)
    page.click("#camera")
    page.wait_for_selector("#recorder:visible")
    assert page.get_attribute("#camera", "aria-pressed") == "true" and page.is_disabled("#mic")
    page.wait_for_function("() => document.getElementById('preview').videoWidth > 0")
    page.wait_for_function("() => /^\\w+ \\d+ %$/.test(document.getElementById('live').innerText)")
    page.wait_for_function("() => Number(document.getElementById('level').getAttribute('aria-valuenow')) > 0")
    page.fill("#text", "hello there")
    page.click("#send")
    wait_for_end(page, 1)
    assert page.locator(".said video").count() == 1 and page.locator(".feeling:visible").count() == 1
    assert page.is_hidden("#recorder") and page.locator(".problem").count() == 0
    titles = page.locator(".bars .title").all_text_contents()
    assert titles == ["voice and face together", "voice alone", "face alone"]
    assert [problem for problem in problems if "400" not in problem] == []  # a busy browser's look may be empty
    page.context.close()


def test_the_microphone_and_its_limit(server, browser):
    page, problems = open_page(browser, server)
    page.click("#mic")
    page.wait_for_selector("#recorder:visible")
    assert page.is_hidden("#preview")
    page.wait_for_timeout(1200)
    page.click("#discard")
    page.wait_for_selector("#recorder", state="hidden")
    assert page.locator("#attachments li").count() == 0 and page.evaluate("document.activeElement.id") == "mic"
    page.click("#mic")
    page.wait_for_selector("#recorder:visible")
    page.wait_for_timeout(1200)
    page.keyboard.press("Escape")  # ends the recording and keeps it
    page.wait_for_selector("#attachments audio")
    page.click("#mic")
    page.wait_for_selector("#attachments audio", timeout=30_000)
    page.wait_for_selector("#recorder", state="hidden", timeout=30_000)  # after --max_seconds
    page.wait_for_selector("#notice:has-text('replaces the one that was attached')")
    page.press("#text", "Enter")
    wait_for_end(page, 1)
    assert page.locator(".said audio").count() == 1 and page.locator(".bars .title").all_text_contents() == [
        "recognized"
    ]
    assert problems == []
    page.context.close()


def test_a_look_never_delays_a_turn(slow_server, browser):
    """While another visitor's reply is generated, the live emotion is left out, and turns are answered."""
    one, _ = open_page(browser, slow_server)
    two, problems = open_page(browser, slow_server)
    begin(one, "hello there")
    with two.expect_response(lambda response: response.url.endswith("/v1/emotion")) as answer:
        two.click("#mic")
    assert answer.value.json().get("skipped") is True
    assert two.inner_text("#live") == "" and problems == []
    one.keyboard.press("Escape")
    two.wait_for_function("() => /^\\w+ \\d+ %$/.test(document.getElementById('live').innerText)")
    for page in (one, two):
        page.context.close()


def test_a_denied_permission_says_what_to_do(server, driver):
    flags = [flag for flag in FLAGS if flag != "--use-fake-ui-for-media-stream"]
    browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
    try:
        page, problems = open_page(browser, server)
        for button, names in (("camera", "the camera and the microphone"), ("mic", "the microphone")):
            page.click(f"#{button}")
            page.wait_for_selector(f"#notice[role=alert]:has-text('allow {names}')")
            assert "site settings" in page.inner_text("#notice-text") and page.is_hidden("#recorder")
        say(page, "hello there", 1)
        assert problems == []
    finally:
        browser.close()


# ------------------------------------------------------------------ speech


def test_replies_are_spoken_with_the_emotion(server, browser, clip):
    page, problems = open_page(browser, server, SPEECH)
    say(page, "hello there", 1)
    assert page.evaluate("spoken") == []  # off by default
    check_option(page, "speak")
    add_clip(page, clip)
    say(page, "how are you", 2)
    page.wait_for_function("() => spoken.length === 1")
    (spoken,) = page.evaluate("spoken")
    assert spoken["text"] == page.locator(".turn:nth-child(2) .reply .bubble").text_content()
    label = page.inner_text(".turn:nth-child(2) .feeling b")
    rates = {"sad": (0.86, 0.88), "happy": (1.1, 1.2), "surprise": (1.15, 1.3)}.get(label, (1, 1))
    assert (spoken["rate"], spoken["pitch"]) == pytest.approx(rates)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.is_checked("#speak")  # the choice is kept
    assert problems == []
    page.context.close()


def test_hands_free_listens_answers_and_listens_again(server, driver, tmp_path, write_media):
    times = np.arange(16000 * 5) / 16000
    sound = (0.5 * np.sin(2 * np.pi * 220 * times) * (times < 1.5)).astype(np.float32)  # then silence
    wav = write_media(tmp_path / "voice.wav", samples=sound[None], sampling_rate=16000, audio_codec="pcm_s16le")
    browser = driver.chromium.launch(
        executable_path=CHROMIUM, args=[*FLAGS, f"--use-file-for-fake-audio-capture={wav}"]
    )
    try:
        page, problems = open_page(browser, server, SPEECH)
        page.click("#menu-button")
        page.check("#hands-free")
        page.wait_for_selector(".said audio", timeout=30_000)  # nobody has pressed Send
        page.wait_for_function("() => spoken.length >= 1")
        page.wait_for_selector("#recorder:visible")  # it listens again
        page.wait_for_function("() => document.querySelectorAll('.turn').length >= 2", timeout=30_000)
        page.keyboard.press("Escape")
        page.wait_for_selector("#recorder", state="hidden")
        assert not page.is_checked("#hands-free") and page.locator(".problem").count() == 0 and problems == []
    finally:
        browser.close()


# ------------------------------------------------------------------ form


SIZES = [(1280, 900), (390, 844), (390, 450)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", SIZES)
def test_it_fits_is_accessible_and_follows_the_colors_of_the_system(
    server, browser, clip, violations, width, height, scheme
):
    options = dict(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 600)
    page, problems = open_page(browser, server, **options)
    found = []

    def check(what):
        over = """[...document.querySelectorAll("body *")].filter((each) => each.getClientRects().length &&
            !each.closest(".replies.several") && each.getBoundingClientRect().right > innerWidth + 0.5)
            .map((each) => each.outerHTML.slice(0, 80))"""
        assert page.evaluate(over) == [], what
        small = """[...document.querySelectorAll("button, textarea, input:not([type=checkbox]), label")]
            .filter((each) => each.getClientRects().length && !each.classList.contains("hidden"))
            .filter((each) => Math.min(each.getBoundingClientRect().height, each.getBoundingClientRect().width) < 43.5)
            .map((each) => each.outerHTML.slice(0, 80))"""
        assert page.evaluate(small) == [], what
        assert page.evaluate("document.documentElement.scrollHeight") <= height, what
        found.extend((what, each) for each in violations(page))

    check("empty")
    page.click("#menu-button")
    check("menu")
    page.check("#column-blind")
    page.keyboard.press("Escape")
    add_clip(page, clip)
    check("attached")
    say(page, "hello" * 100, 1)
    page.click(".feeling")
    check("comparing")
    # What was just said is in view, also with an open keyboard.
    view, composer = page.locator("#conversation").bounding_box(), page.locator("#composer").bounding_box()
    assert composer["y"] + composer["height"] <= height + 1 and view["height"] > 0.4 * height
    page.click("#camera")
    page.wait_for_selector("#recorder:visible")
    check("recording")
    page.click("#discard")
    page.click("#new")
    check("undo")
    say(page, "hello there", 1)
    reply = page.locator(".reply .bubble").first.bounding_box()
    assert view["y"] <= reply["y"] and reply["y"] + reply["height"] <= page.locator("#composer").bounding_box()["y"] + 1
    assert page.evaluate("parseFloat(getComputedStyle(document.getElementById('text')).fontSize)") >= 16
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", paper)[0]) < 60) == (scheme == "dark"), paper
    assert found == [] and problems == []
    page.context.close()


def test_two_short_turns_fit_a_screen(server, browser):
    page, _ = open_page(browser, server, viewport={"width": 1280, "height": 900})
    for number in (1, 2, 3):
        say(page, "hello", number)
    heights = [turn.bounding_box()["height"] for turn in page.locator(".turn").all()]
    assert max(heights) < 180
    page.context.close()


def test_the_keyboard_is_enough_and_focus_stays(server, browser):
    page, problems = open_page(browser, server)
    page.focus("#text")
    page.keyboard.type("hello there")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    wait_for_end(page, 1)
    assert "again" in said(page)[0] and page.evaluate("document.activeElement.id") == "text"
    page.focus("#conversation")
    for label in ("Copy your message", "Edit your message", "Speak this reply", "Copy this reply", "Answer again"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == label
    page.keyboard.press("Enter")
    wait_for_end(page, 1)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Answer again"
    page.focus("#menu-button")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#menu') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "menu-button" and problems == []
    page.context.close()


def test_reduced_motion_stops_all_motion(server, browser):
    page, _ = open_page(browser, server, reduced_motion="reduce")
    page.evaluate("document.getElementById('turns').innerHTML = '<p class=stage>x</p>'")
    assert page.evaluate("getComputedStyle(document.querySelector('.stage'), '::after').animationName") == "none"
    page.context.close()
