"""The rater's page of the human evaluation in a real browser, against the real command in its own process."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from empathic.cli import main
from empathic.evaluation.study.answers import read_answers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("There is no Chromium on this machine (Debian: apt install chromium).", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`).")

EVIL = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"><b>Oh no.</b>"
SYSTEMS = ("zebra", "quokka")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def replies(tmp_path_factory, write_media, grey_frames, tone):
    """Files of two systems: three conversations, the second one's clip in a format that no browser plays."""
    folder = tmp_path_factory.mktemp("replies")
    paths = [
        write_media(folder / "0.mp4", frames=grey_frames(20), samples=tone(2.0)),
        write_media(
            folder / "1.avi", frames=grey_frames(20), samples=tone(2.0), video_codec="mpeg4", audio_codec="mp3"
        ),
        write_media(folder / "2.wav", samples=tone(2.0), audio_codec="pcm_s16le"),
    ]
    for system in SYSTEMS:
        with open(folder / f"{system}.jsonl", "w") as file:
            for number, path in enumerate(paths):
                kinds = ("audio",) if path.suffix == ".wav" else ("audio", "video")
                content = [{"type": kind, "path": str(path)} for kind in kinds]
                content.append({"type": "text", "text": f"They said <i>no</i> {number}."})
                prompt = [
                    {"role": "user", "name": "Ann", "content": "It was about a very-long-" + "word" * 30},
                    {"role": "assistant", "name": "Ben", "content": "And did it come?"},
                    {"role": "user", "name": "Ann", "content": content},
                ]
                reply = EVIL if system == "zebra" else "I am sorry. " * 12
                file.write(json.dumps({"id": str(number), "prompt": prompt, "reply": reply, "reference": None}) + "\n")
    return [str(folder / f"{system}.jsonl") for system in SYSTEMS]


@pytest.fixture(scope="module")
def built(tmp_path_factory, replies):
    folder = tmp_path_factory.mktemp("built") / "study"
    options = ["--conversations", "3", "--raters", "2", "--checks", "1", "--min_seconds", "0", "--min_played", "0.3"]
    assert main(["study", "build", *replies, "--out", str(folder), "--static", *options]) == 0
    return folder


@pytest.fixture
def study(tmp_path, built):
    return Path(shutil.copytree(built, tmp_path / "study"))


class Served:
    """`empathic study serve` in a process of its own."""

    def __init__(self, folder, port):
        command = [sys.executable, "-m", "empathic.cli", "study", "serve", str(folder), "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.links = []
        while len(self.links) < 2:
            line = self.process.stdout.readline()
            assert line, "the server ended"
            self.links += re.findall(r"http://\S+", line)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def server(study):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    servers = [Served(study, port)]
    yield servers
    servers[-1].kill()


def until(page, expression, seconds=20):
    """Waits for an expression to be true; Playwright's own way evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} is not true after {seconds} s"
        page.wait_for_timeout(20)


def open_page(browser, link, **options):
    """A page in a browser profile of its own, and what went wrong in it."""
    page, problems = browser.new_context(**options).new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(link)
    return page, problems


def play(page):
    """Plays the last clip for a second."""
    clip = "document.querySelector('#messages li.last video, #messages li.last audio')"
    if page.evaluate(f"{clip}.currentTime") < 1:
        page.keyboard.press("p")
    until(page, f"{clip}.currentTime > 1 && {clip}.readyState >= 2 && {clip}.error === null")


def asked_for(page):
    """What an attention check asks for, or None."""
    reply = page.inner_text("#reply")
    found = re.search(r'answer "(bad|medium|good)"', reply)
    return found and {"bad": "1", "medium": "2", "good": "3"}[found[1]]


def judge(page):
    """Answers the item in view: what a check asks for, else good for one system and bad for the other."""
    wanted = asked_for(page) or ("3" if page.inner_text("#reply").startswith("I am sorry") else "1")
    page.keyboard.press(wanted)
    assert page.is_disabled("#next") or page.evaluate("document.querySelectorAll('input:checked').length") == 2
    page.keyboard.press(wanted)


def saved(page):
    until(page, "document.getElementById('saving').textContent === 'All answers saved'")


def test_a_rater_watches_answers_reloads_and_finishes(study, server, browser, capsys):
    page, problems = open_page(browser, server[0].links[0])
    code = server[0].links[0].rsplit("/", 1)[1]
    file = study / "answers" / f"{code}.jsonl"
    content = page.content()
    assert page.is_visible("#begin") and not any(system in content for system in SYSTEMS)
    page.click("#begin")
    first = page.inner_text("#reply")
    # No way on before both questions are answered, by mouse or by key.
    page.keyboard.press("Enter")
    assert page.is_disabled("#next") and page.is_disabled("#back")
    play(page)
    page.click("fieldset:nth-of-type(2) label:nth-of-type(3)")
    page.keyboard.press("Enter")
    assert page.is_disabled("#next") and page.inner_text("#reply") == first
    page.click("fieldset:nth-of-type(1) label:nth-of-type(1)")
    saved(page)
    assert [(line["question"], line["score"]) for line in read_answers(file)[0]] == [("empathy", 3), ("semantics", 1)]
    page.click("#next")
    # Half of the second reply is judged, then the page is loaded again: nothing is lost.
    page.keyboard.press(asked_for(page) or "2")
    saved(page)
    second = page.inner_text("#reply")
    page.reload()
    assert page.inner_text("#progress") == "1 of 7 replies judged" and page.inner_text("#reply") == second
    assert page.evaluate("document.querySelectorAll('input:checked').length") == 1
    page.click("#back")
    chosen = page.evaluate("[...document.querySelectorAll('input:checked')].map((input) => input.value)")
    assert chosen == ["1", "3"] and page.inner_text("#reply") == first
    # From the first reply on again, with the keys only; the scores are changed.
    for _ in range(7):
        assert page.is_visible("#rating") and page.inner_text("#heading").startswith("Reply ")
        play(page)
        page.keyboard.press("ArrowUp")  # to the first question
        judge(page)
        page.keyboard.press("Enter")
    assert page.is_visible("#end") and "Thank you" in page.inner_text("#thanks")
    until(page, "document.getElementById('all-saved').textContent.startsWith('All your answers are saved')")
    lines = read_answers(file)[0]
    assert len({(line["item"], line["question"]) for line in lines}) == 14
    assert all(line["received"] for line in lines) and max(line["played"] for line in lines) >= 1
    assert problems == [] and page.title() == "Which reply fits?"
    page.context.close()

    assert main(["study", "analyze", str(study), "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 raters are counted; 1 started." in printed
    result = json.loads((study / "analysis.json").read_text())
    for question in ("semantics", "empathy"):
        means = {system: row["mean"] for system, row in result["scores"][question].items()}
        assert means == {"zebra": 1, "quokka": 3}
        assert result["preferences"][question][0]["worse"] == 1
    assert result["raters"][0]["played"] == 1 and result["raters"][0]["failed_checks"] == 0


def test_a_crash_of_the_server_loses_nothing(study, server, browser):
    links = server[0].links
    page, _ = open_page(browser, links[0])
    other, _ = open_page(browser, links[1])  # several raters at once
    for each in (page, other):
        each.click("#begin")
        each.keyboard.press("2")
        saved(each)
    server[0].kill()
    page.keyboard.press("3")
    until(page, "document.getElementById('saving').textContent.includes('Not saved yet')")
    again = page.context.new_page()
    page.close()  # with the answer that no server has
    server.append(Served(study, links[0].split(":")[2].split("/")[0]))
    assert server[1].links == links
    again.goto(links[0])
    saved(again)
    assert again.inner_text("#progress") == "1 of 7 replies judged"
    scores = [line["score"] for line in read_answers(study / "answers" / f"{links[0].rsplit('/', 1)[1]}.jsonl")[0]]
    assert scores == [2, 3]
    other.keyboard.press("1")
    saved(other)
    scores = [line["score"] for line in read_answers(study / "answers" / f"{links[1].rsplit('/', 1)[1]}.jsonl")[0]]
    assert scores == [2, 1]
    for each in (again, other):
        each.context.close()


@pytest.mark.parametrize(
    "width, scheme, colour", [(1280, "light", "rgb(255, 255, 255)"), (360, "dark", "rgb(22, 24, 28)")]
)
def test_texts_are_texts_and_nothing_overflows(server, browser, violations, width, scheme, colour):
    options = dict(viewport={"width": width, "height": 740}, color_scheme=scheme)
    page, problems = open_page(browser, server[0].links[1], **options)
    assert violations(page) == []
    page.click("#begin")
    seen = set()
    for _ in range(7):
        reply = page.text_content("#reply")
        seen.add(reply)
        assert page.evaluate("document.querySelector('#rating script, #rating img, #rating b, #rating i')") is None
        assert page.text_content("#messages li.last .text").startswith("They said <i>no</i>")
        over = """[...document.querySelectorAll('body *')].filter((each) => each.getClientRects().length &&
            (each.getBoundingClientRect().right > innerWidth + 0.5 || each.scrollWidth > each.clientWidth + 1
             && getComputedStyle(each).display !== 'inline')).map((each) => each.outerHTML.slice(0, 80))"""
        assert page.evaluate(over) == [] and violations(page) == []
        judge(page)
        page.keyboard.press("Enter")
    assert EVIL in seen and page.title() == "Which reply fits?"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colour
    # The policy would stop what the page does not.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror=\"document.title = 'broken'\">`)")
    page.wait_for_timeout(200)
    assert page.title() == "Which reply fits?" and any("Content Security Policy" in problem for problem in problems)
    page.context.close()


def test_a_static_page_keeps_answers_and_gives_them_as_a_file(study, browser, tmp_path, capsys):
    pages = sorted((study / "static").glob("*.html"))
    page, problems = open_page(browser, pages[0].as_uri())
    page.click("#begin")
    play(page)
    judge(page)
    page.reload()
    assert page.inner_text("#progress") == "1 of 7 replies judged"
    while page.is_visible("#rating"):
        judge(page)
        page.keyboard.press("Enter")
    with page.expect_download() as download:
        page.click("#download")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == f"{pages[0].stem}.jsonl" and problems == []
    page.context.close()
    assert main(["study", "analyze", str(study), "--answers", str(file), "--resamples", "50"]) == 0
    assert "quokka  3.00 [3.00, 3.00]" in capsys.readouterr().out
