"""A token that is given to a command is in nothing that the command writes, pushes or prints."""

import pytest

from empathic.cli import main

TOKEN = "hf_of_me"


@pytest.mark.parametrize(
    ("line", "kind", "name"),
    [
        (["push-metric", "dist_n", "me/dist_n"], "space", "me/dist_n"),
        (["push", "MODEL", "me/model"], "model", "me/model"),
        (["push", "MODEL", "not a name"], None, None),
    ],
)
def test_no_push_writes_its_token(line, kind, name, hub, base_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    line = [base_folder if word == "MODEL" else word for word in line]
    assert main([*line, "--token", TOKEN]) == (0 if name else 1)
    if name:
        pushed = hub.files(name, kind)
        assert pushed and not [file for file, content in pushed.items() if TOKEN.encode() in content]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "".join(capfd.readouterr())
