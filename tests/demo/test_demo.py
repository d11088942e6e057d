"""The page without a browser: its files, its examples, and the Space."""

import json
import re
import shutil
from pathlib import Path

import httpx2
import pytest

from empathic.cli import main

pytest.importorskip("fastapi", reason="FastAPI is not installed (extra `demo`).")

from empathic.demo.app import STATIC, PageOptions
from empathic.demo.examples import example_files, read_examples

ROW = '{"dialogue_id": "%s", "split": "test", "turn": %d, "speaker": "%s", "text": "t%d", "video": %s}\n'


@pytest.fixture
def recorded(tmp_path, clip):
    """A folder of recordings with one conversation of four turns, whose third has a clip."""
    (tmp_path / "a.mp4").write_bytes(Path(clip).read_bytes())
    lines = [ROW % ("d", i, ("user", "assistant")[i % 2], i, '"a.mp4"' if i == 2 else "null") for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("".join([*lines, ROW % ("e", 0, "assistant", 0, "null")]))
    return tmp_path


def test_examples_end_with_a_clip(recorded, tmp_path_factory):
    with pytest.raises(ValueError, match="no examples"):
        read_examples(tmp_path_factory.mktemp("empty"))
    (example,) = read_examples(recorded)
    assert example.text == "t2" and example.clip == recorded / "a.mp4"
    assert [(message["role"], message["content"]) for message in example.history] == [
        ("user", "t0"),
        ("assistant", "t1"),
    ]


def test_examples_travel_as_files(recorded, tmp_path_factory):
    examples, folder = read_examples(recorded), tmp_path_factory.mktemp("copy")
    for name, content in example_files(examples).items():
        (folder / name).write_bytes(content)
    (copied,) = read_examples(folder)
    assert (copied.history, copied.text) == (examples[0].history, examples[0].text)
    assert copied.clip.read_bytes() == examples[0].clip.read_bytes()


def test_half_an_emoji_is_replaced(tmp_path, clip):
    shutil.copyfile(clip, tmp_path / "a.mp4")
    row = {"dialogue_id": "d", "turn": 0, "speaker": "user", "text": "half \ud83d", "video": "a.mp4"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert read_examples(tmp_path)[0].text == "half \N{REPLACEMENT CHARACTER}"


def test_there_are_four_drawn_examples_without_recordings(recorded, tmp_path_factory):
    from empathic.commands.demo import find_examples
    from empathic.media_empathic import probe

    examples = find_examples(None, tmp_path_factory.mktemp("samples"))
    assert len(examples) == 4 and len({example.clip for example in examples}) == 4
    for example in examples:
        found = probe(str(example.clip))
        assert found.has_audio and found.has_video and example.text
    # The same words with another face.
    assert examples[0].text == examples[1].text and examples[0].clip.read_bytes() != examples[1].clip.read_bytes()
    assert find_examples(str(recorded), recorded) == read_examples(recorded)


def test_the_page_loads_nothing_from_elsewhere(serve_page, recorded):
    page = serve_page(examples=read_examples(recorded))
    answer = httpx2.get(page.url)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    names = [path.name for path in STATIC.iterdir()]
    assert {"index.html", "page.css", "page.js"} <= set(names)
    for name in names:
        text = (STATIC / name).read_text(encoding="utf-8")
        addresses = re.findall(r"https?://[^\s\"'`)]+", text)
        assert all(address.startswith("http://www.w3.org/") for address in addresses), (name, addresses)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
        served = httpx2.get(f"{page.url}/static/{name}")
        assert served.content == (STATIC / name).read_bytes() and "content-security-policy" in served.headers
    assert httpx2.get(f"{page.url}/static/page.js").headers["content-type"].startswith("text/javascript")
    for path in ("/static/none.js", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/examples/1", "/examples/-1"):
        assert httpx2.get(page.url + path).status_code == 404, path
    assert httpx2.get(f"{page.url}/examples/a").status_code in (404, 422)
    clip = httpx2.get(f"{page.url}/examples/0")
    assert clip.headers["content-type"] == "video/mp4" and clip.content == (recorded / "a.mp4").read_bytes()
    part = httpx2.get(f"{page.url}/examples/0", headers={"Range": "bytes=0-99"})
    assert part.status_code == 206 and len(part.content) == 100  # without it, Safari plays nothing


def test_every_file_of_the_page_is_used_and_every_import_exists():
    names = {path.name for path in STATIC.iterdir()}
    imported = set()
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for found, name in re.findall(r'^import (.+) from "\./(.+)";$', text, flags=re.MULTILINE):
            imported.add(name)
            exported = (STATIC / name).read_text(encoding="utf-8")
            for each in re.findall(r"\w+", found.removeprefix("* as")) if "{" in found else []:
                assert re.search(rf"^export (async )?(function\*? |const |class ){each}\b", exported, re.MULTILINE), (
                    each
                )
    assert imported <= names and names == imported | {"index.html", "page.css", "page.js"}


def test_the_settings_name_the_columns(serve_page, base_folder, recorded):
    page = serve_page(compare=base_folder, examples=read_examples(recorded))
    settings = httpx2.get(f"{page.url}/settings.json").json()
    labels = [column["label"] for column in settings["columns"]]
    assert labels[:3] == ["this model", "without voice and face", "without memory"] and len(labels) == 4
    models = {model["id"] for model in httpx2.get(f"{page.url}/v1/models").json()["data"]}
    assert {column["model"] for column in settings["columns"]} == models and len(models) == 2
    assert settings["limits"] == {"megabytes": 0.5, "seconds": 5, "characters": 4000}
    (example,) = settings["examples"]
    assert example["text"] == "t2" and len(example["history"]) == 2
    for model in models:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        assert httpx2.post(f"{page.url}/v1/chat/completions", json=body, timeout=60).json()["model"] == model


def test_the_model_before_epo_is_named_so():
    from fastapi import FastAPI
    from starlette.routing import Route

    from empathic.demo.app import add_page

    class Engine:
        with_emotion = True

        class processor:
            with_text = False

    class Service:
        model_name, engines = "model", {"model": Engine, "dialogue": Engine}

    def label(compare, **options):
        app = FastAPI()
        add_page(app, Service, PageOptions(**options), compare)
        (route,) = [each for each in app.routes if isinstance(each, Route) and each.path == "/settings.json"]
        import asyncio

        return json.loads(asyncio.run(route.endpoint()).body)["columns"][-1]["label"]

    assert label("runs/quickstart/dialogue") == "before EPO" and label("me/other") == "dialogue"
    assert label("runs/dialogue", compare_name="last week's") == "last week's"


# ------------------------------------------------------------------------------------------------------------ Space


def test_a_space_runs_from_the_hub(base_folder, hub, recorded, run_space, capsys):
    import yaml
    from hub_server import USER

    from empathic.hub.models import push_model

    space = f"{USER}/talk"
    assert main(["push-space", f"{USER}/tiny", space]) == 1  # the model is not there yet
    assert "me/tiny" in capsys.readouterr().err and not hub.repositories.get(("space", space))
    assert main(["push-space", base_folder, space]) == 1
    assert "Push it with `empathic push`" in capsys.readouterr().err
    push_model(base_folder, f"{USER}/tiny")
    assert main(["push-space", f"{USER}/tiny", space, "--compare", f"{USER}/before"]) == 1
    assert "me/before" in capsys.readouterr().err and not hub.repositories.get(("space", space))
    push_model(base_folder, f"{USER}/before")
    options = [
        "--compare",
        f"{USER}/before",
        "--max_seconds",
        "7",
        "--max_new_tokens",
        "4",
        "--examples",
        str(recorded),
    ]
    assert main(["push-space", f"{USER}/tiny", space, *options]) == 0
    assert f"{hub.url}/spaces/{space}" in capsys.readouterr().out

    files = hub.files(space, type="space")
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["sdk"] == "docker" and f"port={card['app_port']}" in files["app.py"].decode()
    assert card["models"] == [f"{USER}/tiny", f"{USER}/before"] and b'CMD ["python", "app.py"]' in files["Dockerfile"]
    needed = files["requirements.txt"].decode()
    for name in ("transformers", "fastapi", "uvicorn", "prometheus-client", "peft"):
        assert re.search(rf"^{name}[<>=]", needed, re.M), name
    assert "pytest" not in needed and "gradio" not in needed and "spaces" not in needed
    assert "empathic/demo/zero_gpu.py" not in files
    with run_space(files, 0, "http://") as printed:
        url = re.search(r"http://\S+", printed)[0].replace("0.0.0.0", "127.0.0.1")
        settings = httpx2.get(f"{url}/settings.json").json()
        assert settings["model"] == "tiny" and settings["limits"]["seconds"] == 7
        assert [column["label"] for column in settings["columns"]][3] == "before"
        assert httpx2.get(f"{url}/examples/0").content == (recorded / "a.mp4").read_bytes()
        assert "static/page.js" in httpx2.get(url).text and httpx2.get(f"{url}/static/page.js").status_code == 200
        body = {"model": "before", "messages": [{"role": "user", "content": "hello there"}]}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] <= 4
