"""`empathic evaluate report`: from results, also of the real commands, to a page in a real browser, Markdown, LaTeX."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from datasets import load_dataset

from empathic import quickstart
from empathic.cli import main
from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.corpora.folder import prepare_folder
from empathic.data_prep.views import DialogueSamples
from empathic.evaluation.published import FIGURE_6, SOURCE, TABLE_1, TABLE_2
from empathic.evaluation.report.build import find_results, write_report
from empathic.evaluation.report.costs import efficiency_parts
from empathic.evaluation.report.exchanges import ReportClips
from empathic.evaluation.report.parts import PUBLISHED_NOTE, Section, Table
from empathic.evaluation.report.scores import QUICKSTART_COLUMNS
from empathic.evaluation.report.text import latex, latex_number, latex_table, latex_text, markdown_text
from empathic.tiny.emotion_classifier import train_emotion_classifier

EVIL = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> **no** | $x_1$ & 5%"
NAMES = {"ours": "ours", "long": "a-system-with-a-very-long-name/" + "part" * 9, "evil": "<b>$\\evil_{1}$</b>"}
VERSIONS = {"python": "3.11.2", "empathic": "0.1.0", "bert-score": None}
SETTINGS = {"split": "test", "seed": 17, "confidence": 0.95, "resamples": 1000, "interval": "bootstrap"}


def interval(mean, width=0.02):
    return {"mean": mean, "low": mean - width, "high": mean + width}


def compared(a, b, metric, difference):
    return {"a": a, "b": b, "metric": metric, **interval(difference, 0.01), "difference": difference, "p": 0.0312}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_dialogue(folder, clips, corpus="meld", names=None):
    """dialogue.json of some systems with four conversations each, as `empathic evaluate dialogue` writes it."""
    systems = {}
    edges = [round(-1 + i / 20, 2) for i in range(41)]
    for place, name in enumerate(names or NAMES.values()):
        file = folder / "dialogue" / f"system{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w") as lines:
            for number, clip in enumerate(clips):
                content = [{"type": kind, "path": str(clip)} for kind in ("audio", "video")] if clip else []
                content.append({"type": "text", "text": f"They said <i>no</i> {number}."})
                prompt = [{"role": "system", "content": "hidden"}]
                prompt += [
                    {"role": "user", "name": "Ann", "content": f"Turn {turn}. " + "word" * 40} for turn in range(8)
                ]
                prompt.append({"role": "user", "name": "Ann <b>", "content": content})
                reply = "" if number == 1 else EVIL if place == 0 else "I am so sorry.\n" * 3
                row = {"id": f"{corpus}/test/d{number}/8", "prompt": prompt, "reply": reply, "emotion": "sad"}
                lines.write(json.dumps({**row, "reference": "Oh no & yes."}) + "\n")
        counts = [0] * 40
        counts[25 + place], counts[30 + place] = 3, 1
        systems[name] = {
            "metrics": {
                "bertscore": interval(0.85 + place / 100),
                "emotion_score": interval(0.4 + place / 10),
                "corpus_dist1": {"mean": 0.25, "low": None, "high": None},
            },
            "histograms": {"emotion_score": {"edges": edges, "counts": counts}},
            "count": len(clips), "empty": 1, "notes": [], "settings": {"target": name, "batch_size": 8},
            "replies": f"dialogue/system{place}.jsonl",
        }  # fmt: skip
    first, *others = systems
    write_json(
        folder / "dialogue.json",
        {
            "table": "dialogue", "systems": systems, "baseline": first,
            "comparisons": [compared(other, first, "bertscore", 0.0123) for other in others],
            "computed_by": {"bertscore": "bert-score 0.3.13, roberta-large, layer 17"},
            "skipped": {"dist1": "not asked for"}, "left_out": [{"id": "meld/test/d9/1", "reason": EVIL}],
            "settings": {**SETTINGS, "data": f"data/{corpus}", "corpora": {corpus: len(clips)}}, "versions": VERSIONS,
            "published": {"source": SOURCE, "rows": {corpus: TABLE_1[corpus]} if corpus in TABLE_1 else {}},
        },
    )  # fmt: skip


def write_ablation(folder):
    systems = {
        row: {
            "metrics": {name: interval(0.5 + place / 20) for name in ("bertscore", "emotion_score", "dist1")},
            "count": 40, "empty": 0, "notes": [], "settings": {"target": f"runs/{row}"},
            "replies": f"ablation/{row}.jsonl",
        }
        for place, row in enumerate(("text", "memory", "memory_av", "epo"))
    }  # fmt: skip
    write_json(
        folder / "ablation.json",
        {
            "table": "ablation", "systems": systems, "baseline": "text",
            "comparisons": [compared("epo", "text", "emotion_score", 0.15)],
            "computed_by": {}, "skipped": {}, "left_out": [],
            "settings": {**SETTINGS, "data": "data/iemocap", "corpora": {"iemocap": 40}}, "versions": VERSIONS,
            "published": {"source": SOURCE, "rows": {"iemocap": TABLE_2}},
        },
    )  # fmt: skip


def write_emotion(folder):
    confusion = {true: {name: 7 if name == true else 1 for name in (*EMOTIONS, "other")} for true in EMOTIONS}
    systems = {
        name: {
            "metrics": {"accuracy": interval(0.3 + place / 10), "mean_recall": interval(0.25 + place / 10)},
            "recall": {emotion: None if emotion == "disgust" else 0.5 for emotion in EMOTIONS},
            "confusion": confusion, "count": 98, "notes": [], "settings": {"shown": name}, "replies": f"emotion/{name}",
        }
        for place, name in enumerate(("T", "A", "V", "A+T", "V+T", "A+V+T"))
    }  # fmt: skip
    settings = {**SETTINGS, "model": "runs/emotion", "data": "data/meld", "corpora": {"meld": 98}, "left_out": 3}
    write_json(
        folder / "emotion.json",
        {
            "table": "emotion", "systems": systems, "comparisons": [compared("A+V+T", "T", "accuracy", 0.5)],
            "settings": {**settings, "trained_with_text": False}, "versions": VERSIONS, "published": FIGURE_6,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory, clip):
    """A folder with everything but reconstruction and efficiency."""
    folder = tmp_path_factory.mktemp("results")
    write_dialogue(folder, [clip, clip, None, folder / "gone.mp4"])
    write_ablation(folder)
    write_emotion(folder)
    return folder


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    """The folder of its report."""
    output = tmp_path_factory.mktemp("report")
    assert main(["evaluate", "report", str(results), "--output", str(output)]) == 0
    return output


def html_rows(text):
    """The cells of all rows of all tables, without their tags."""
    rows = re.findall(r"<tr.*?</tr>", text, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


# ---------------------------------------------------------------------------------------------------------- the texts


def test_rows_stand_beside_the_published_ones(written):
    rows = html_rows((written / "report.html").read_text())
    assert ["ours", "4", "0.850 [0.830, 0.870]", "0.400 [0.380, 0.420]", "0.250"] in rows
    assert ["GPT-4o published", "–", "0.871", "0.411", "–"] in rows  # MELD, and no other corpus
    assert not any("0.855" in row for row in rows)
    published = [row[0].removesuffix(" published") for row in rows if row and row[0].endswith(" published")]
    assert published[: len(TABLE_1["meld"])] == list(TABLE_1["meld"]) and len(published) == 8 + 5
    assert ["FT + MC + AV + EPO", "40", *["0.650 [0.630, 0.670]"] * 3] in rows
    assert ["FT + MC + AV + EPO, IEMOCAP published", "–", "0.907", "0.593", "0.983"] in rows
    assert ["A+V+T", "98", "0.800 [0.780, 0.820]", "0.750 [0.730, 0.770]"] in rows
    assert ["epo", "text", "EmotionScore", "+0.150 [+0.140, +0.160]", "0.031", "0.031"] in rows
    assert ["settings.seed", "17"] in rows and ["versions.python", "3.11.2"] in rows
    assert ["systems.ours.batch_size", "8"] in rows
    markdown = (written / "report.md").read_text()
    assert "| ours | 4 | 0.850 [0.830, 0.870] |" in markdown
    assert "| GPT-4o (published) | – | 0.871 | 0.411 | – |" in markdown and markdown_text(PUBLISHED_NOTE) in markdown
    latex = (written / "tables.tex").read_text()
    assert r"GPT-4o (published) & – & 0.871 & 0.411 & – \\".replace("–", "--") in latex
    assert latex_text(PUBLISHED_NOTE) in latex


def test_what_is_not_there_is_named(written):
    text = (written / "report.html").read_text()
    for missing in ("Table 8 (rebuilt utterances)", "Table 3 (costs of the history)", "Replies of text"):
        assert f"<b>Missing:</b> {missing}" in text
    assert "Table 1 (replies)" not in text  # which is there


def test_texts_are_escaped_everywhere(written):
    text = (written / "report.html").read_text()
    assert "<script" not in text and "<img" not in text and "<i>no" not in text
    assert "&lt;script&gt;" in text and "They said &lt;i&gt;no&lt;/i&gt; 0." in text and "hidden" not in text
    markdown = (written / "report.md").read_text()
    assert "<script" not in markdown and "**no**" not in markdown
    assert "&#60;b&#62;" in markdown or "&lt;b&gt;&#36;&#92;evil&#95;&#123;1&#125;" in markdown
    for line in markdown.splitlines():  # no text breaks a table
        if line.startswith("| ours |"):
            assert line.count("|") == 6
    assert r"\textless{}b\textgreater{}\$\textbackslash{}evil\_\{1\}\$" in (written / "tables.tex").read_text()


def test_latex_tables_are_balanced():
    table = Table("50% & more_of {it}", ["a", "b"], [["[x] #1", "1.0"], ["* Ours†", "~2^3"]], published=1)
    text = latex_table(table)
    assert "\\begin{tabular}{lr}" in text and "{[}x{]} \\#1 & 1.0 \\\\\n\\midrule\n{*} Ours\\dag{} (published)" in text
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}") and "50\\% \\& more\\_of \\{it\\}" in text
    assert all(line.count(" & ") == 1 for line in text.splitlines() if line.endswith(r"\\"))
    with pytest.raises(ValueError, match="3 cells below 2 columns"):
        Table("t", ["a", "b"], [["1", "2", "3"]])


STRANGE = (
    "50% & a_b #1 {x} $y ~z ^w \\\\q <a>|`c` [d]* é ß ő ą « „ ± − ≤ … – — × “ ” ’ ² ₁ → ✓ 模型 🙂 "
    "\x07 a--b --o e\u0301 q\u0308"
)


def test_latex_has_no_letter_that_it_cannot_print():
    assert latex_text("a_b & 50% #1 {x} $ ~ ^ \\ `") == (
        r"a\_b \& 50\% \#1 \{x\} \$ \textasciitilde{} \textasciicircum{} \textbackslash{} \textasciigrave{}"
    )
    assert latex_text("± − ≤ … – —") == r"$\pm$ $-$ $\leq$ \ldots{} -- ---"
    assert latex_text("--min_seconds") == r"-{}-min\_seconds" and latex_text("a---b") == "a-{}-{}-b"
    assert latex_text("x₁²") == "x$_{1}$²" and latex_text("e\u0301") == "é"
    assert latex_text("模") == r"\ifdefined\Umathchar 模\else {U+6A21}\fi{}"
    assert latex_text("ą") == r"\ifdefined\Umathchar ą\else {U+0105}\fi{}" and latex_text("\x07") == "{U+0007}"
    assert latex_number("-0.12 [-0.50, +0.25]") == r"$-$0.12 {[}$-$0.50, +0.25{]}"
    table = Table("t", ["system", "input positions of it"], [["GPT-4o", "-1.0"], ["a - b", "–"]])
    text = latex_table(table)
    assert r"system & \shortstack[r]{input positions\\of it} \\" in text
    assert r"GPT-4o & $-$1.0 \\" in text and r"a - b & -- \\" in text


def compile_latex(folder, *lines):
    """The log of pdfLaTeX, whose every error stops it."""
    pdflatex = shutil.which("pdflatex")
    if pdflatex is None:
        pytest.skip("There is no pdflatex on this machine (Debian: apt install texlive-latex-recommended).")
    body = [
        r"\documentclass{article}",
        r"\usepackage{booktabs,graphicx}",
        r"\begin{document}",
        *lines,
        r"\end{document}",
    ]
    (folder / "page.tex").write_text("\n".join(body) + "\n", encoding="utf-8")
    command = [pdflatex, "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "page.tex"]
    run = subprocess.run(command, cwd=folder, capture_output=True)
    log = (folder / "page.log").read_text(encoding="utf-8", errors="replace")
    assert run.returncode == 0, log[-3000:]
    return log


def test_the_tables_compile(written, tmp_path):
    log = compile_latex(tmp_path, rf"\input{{{written / 'tables.tex'}}}")
    assert "Output written on page.pdf" in log and "Missing character" not in log
    assert "Overfull" not in log  # every table fits the page
    table = Table(STRANGE, [STRANGE, STRANGE], [[STRANGE, STRANGE], [STRANGE, "1"]], published=1, notes=[STRANGE])
    few = Table("t", ["a", "b"], [["1", "2"]])
    text = latex([Section("s", [table, *[few] * 90])])
    assert text.count(r"\begin{table}") == 91 and text.count(r"\clearpage") == 2
    log = compile_latex(tmp_path, text)  # LaTeX gives up where 53 tables wait for their page
    assert "Missing character" not in log


def test_the_same_results_give_the_same_bytes(results, written, tmp_path):
    write_report([results], tmp_path / "again")
    for name in ("report.md", "tables.tex"):
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()
    first, second = ((folder / "report.html").read_text() for folder in (written, tmp_path / "again"))
    assert re.sub(r"data:[^\"]*", "", first) == re.sub(r"data:[^\"]*", "", second)


def test_a_corpus_that_the_paper_does_not_have_stands_beside_the_whole_table(tmp_path):
    write_dialogue(tmp_path, [None, None], corpus="mine", names=["a"])
    rows = html_rows(write_report([tmp_path]).read_text())
    assert ["Ours† published", "0.859", "0.459", "0.870", "0.485", "0.907", "0.593"] in rows
    # One system: nothing to compare, and that is said.
    assert "Comparisons of two systems" in (tmp_path / "report.html").read_text()


def test_clips_that_are_too_large_are_links(written, clip, tmp_path):
    text = (written / "report.html").read_text()
    assert text.count('src="data:video/mp4;base64,') == 2 and "gone.mp4" in text
    message = {"role": "user", "content": [{"type": "video", "path": str(clip)}]}
    small = ReportClips(tmp_path, each=10).show(message)
    assert not small.source.startswith("data:") and (tmp_path / small.source).resolve() == Path(clip).resolve()
    once = ReportClips(tmp_path, together=Path(clip).stat().st_size * 3 // 2)
    copy = shutil.copy(clip, tmp_path / "a b#1.mp4")
    other = {"role": "user", "content": [{"type": "video", "path": str(copy)}]}
    shown = [once.show(each).source[:5] for each in (message, message, other)]
    assert shown == ["data:", "data:", "a%20b"]  # the same clip counts once
    stored = {"role": "user", "content": [{"type": "audio", "digest": "12"}, {"type": "text", "text": "x"}]}
    assert once.show(stored).source is None and "stored in the data set" in once.show(stored).note
    assert once.show({"role": "user", "content": "x"}) is None


def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path, capsys):
    assert main(["evaluate", "report", str(tmp_path / "none")]) == 1
    assert main(["evaluate", "report", str(tmp_path)]) == 1
    (tmp_path / "emotion.json").write_text("{")
    assert main(["evaluate", "report", str(tmp_path)]) == 1
    write_json(
        tmp_path / "emotion.json", {"systems": {"T": {"metrics": {}}}, "comparisons": [], "settings": {"data": "d"}}
    )
    assert main(["evaluate", "report", str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and "is not a folder" in errors[0] and "no result files there" in errors[1]
    assert "emotion.json: cannot be read as JSON" in errors[2] and "emotion.json: has no 'recall'" in errors[3]


def test_other_files_of_the_same_names_are_no_results(tmp_path):
    write_json(tmp_path / "report.json", {"rows": 3})  # of `empathic prepare`
    write_json(tmp_path / "results.json", {"accuracy": 1})
    write_ablation(tmp_path / "below")
    assert [found.kind for found in find_results([tmp_path, tmp_path / "below"])] == ["ablation"]


def test_quickstart_and_counter(tmp_path):
    write_json(
        tmp_path / "results.json",
        {
            "emotion": {"T": 0.5, "AT": 0.7, "VT": 0.75, "AVT": 0.9},
            "reconstruction": {"1": {"bleu1": 0.95, "bleu4": 0.9, "recall": 0.8, "exact": 0.7}},
            "dialogue": {
                "epo": {"emotion_score": 0.5, "dist1": 0.9, "recall": 0.4, "reward_accuracy": 0.8, "margin": 2}
            },
            "seeds": {
                name: {"epo": {"mean": 0.9, "sd": 0.01}, "control": {"mean": 0.8, "sd": 0.02}} | more
                for name, more in {
                    "emotion_score": {"difference": {"value": 0.1, "low": 0.05, "high": 0.15}, "p_value": 0.004},
                    **{key: {} for key in list(QUICKSTART_COLUMNS)[1:]},
                }.items()
            },
            "seconds": {"corpus": 3.0},
        },
    )
    audit = {"bin_edges": [-1, 0, 1], "all_candidates": [3, 4], "lowest_of_each_sample": [2, 0]}
    lowest = {"mean": {"least": -0.2, "median": 0.05, "greatest": 0.3}}
    split = {"samples": 5, "scored": 4, "pairs": 2, "lowest_similarity": lowest, "similarities": audit}
    settings = {"pooling": "mean", "threshold": 0.1}
    write_json(tmp_path / "pairs" / "report.json", {"settings": settings, "pairs": 2, "splits": {"train": split}})
    rows = html_rows(write_report([tmp_path]).read_text())
    assert ["+ EPO", "0.500", "–", "0.900", "0.400", "0.800", "2.000"] in rows and ["A+V+T", "0.900"] in rows
    seeds = ["0.900 ± 0.010", "0.800 ± 0.020"]
    assert ["EmotionScore, greedy replies", *seeds, "0.100 [0.050, 0.150]", "0.0040"] in rows and [
        "margin",
        *seeds,
        "",
        "",
    ] in rows
    assert ["MultiDialog, test_freq published", "0.848", "0.679", "–", "–"] in rows
    assert ["train", "5", "4", "2", "-0.200", "0.050", "0.300"] in rows and ["seconds.corpus", "3.0"] in rows


def test_quickstart_writes_it(base_folder, recordings, tmp_path):
    """Its last steps, on a model and a corpus that are at hand."""
    raw = Path(load_dataset(recordings.data, split="validation")[0]["video"]["path"]).parent
    lines = (raw / "metadata.jsonl").read_text().splitlines()
    lines = [line.replace('"validation"', '"test"') for line in lines if '"validation"' in line]
    (tmp_path / "raw").mkdir()
    for clip in raw.glob("validation*"):
        shutil.copy(clip, tmp_path / "raw")
    (tmp_path / "raw" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    root = tmp_path / "run"
    prepare_folder(tmp_path / "raw", root / "data", progress=False)
    (root / "emotion").symlink_to(base_folder)
    train_emotion_classifier(
        root / "parts" / "emotion_classifier", ["a b", "c d"], ["happy", "sad"], steps=1, progress=False
    )
    assert set(quickstart.evaluate_emotion(root)) == {"T", "AT", "VT", "AVT"}
    samples = list(DialogueSamples(load_dataset(str(root / "data"), split="test")))
    replies = {arm: [EVIL] * len(samples) for arm in quickstart.ARMS}
    replies["epo"] = [sample["reply"] for sample in samples]
    page = quickstart.write_evaluation(root, samples, replies)
    assert page == root / "report.html"
    found = json.loads((root / "evaluation" / "dialogue.json").read_text())
    assert found["systems"]["+ EPO"]["metrics"]["emotion_score"]["mean"] == pytest.approx(1, abs=1e-6)
    assert found["systems"]["+ EPO"]["histograms"]["emotion_score"]["counts"] == [0] * 39 + [len(samples)]
    assert [c["b"] for c in found["comparisons"]] == ["+ audio and video"] * 8  # no test of the corpus's Dist-1
    text = page.read_text()
    (row,) = [row for row in html_rows(text) if row[:2] == ["+ EPO", "9"]]
    assert row[2] == "1.000 [1.000, 1.000]" and "<script" not in text
    assert text.count("<svg ") == 2 + 3 and "data:video/mp4" in text


def test_costs_stand_beside_table_3():
    arms = {
        arm: {"positions": 1000 / n, "total_bytes": 2e9, "seconds": 0.1 / n}
        for n, arm in enumerate(("text", "text_reuse", "compressed", "streaming"), 1)
    }
    counts = {way: {"history": 5, "whole": 1234, "with_media": 9} for way in ("text", "memory")}
    results = {
        "name": "n", "text": "t", "settings": {"dtype": "float32", "device": "cpu", "repeats": 3},
        "machine": {"device": "cpu"}, "paper": {"about": "a", "means": arms}, "not_measured": "Nothing was measured.",
        "histories": {"20": {"positions": counts, "arms": None}},
    }  # fmt: skip
    parts = efficiency_parts(results)
    assert [type(part).__name__ for part in parts] == ["str", "Missing", "Table", "Table"]  # no plot of nothing
    costs, positions = parts[2:]
    assert costs.rows[2] == ["compressed (the paper)", "333.3 (-66.7%)", "2 (+0.0%)", "33.33 (-66.7%)", "–"]
    # The changes that the paper prints beside its values.
    assert costs.rows[-1] == ["compressed", "111.52 (-81.6%)", "15.73 (-3.5%)", "79.5 (-28.5%)", "0.848"]
    assert costs.is_published(4) and not costs.is_published(3) and positions.rows[0][3] == "1,234"


# ---------------------------------------------------------------------------------------------------- the real commands


@pytest.fixture(scope="module")
def real(base_folder, recordings, tmp_path_factory):
    """What the real commands write for a tiny model."""
    from accelerate import PartialState

    out = tmp_path_factory.mktemp("real")
    data = [f"--output={out}", "--device=cpu", "--split=validation"]
    replies = ["--data", recordings.data, "--metrics", "dist1", "corpus_dist1", "--max_new_tokens=4", "--resamples=50"]
    systems = [f"a=empathic:{base_folder}", f"b=empathic:{base_folder},media=false"]
    assert main(["evaluate", "dialogue", *systems, *data, *replies]) == 0
    assert main(["evaluate", "emotion", str(base_folder), "--data", recordings.data, *data, "--resamples=50"]) == 0
    line = ["--utterances", "1", "2", "--bertscore_model=none", "--max_runs=2"]
    assert main(["evaluate", "reconstruction", str(base_folder), recordings.data, *data, *line]) == 0
    line = ["--turns", "1", "4", "--repeats=1", "--no-ratios", "--device=cpu", f"--output={out / 'efficiency'}"]
    assert main(["evaluate", "efficiency", "--preset=tiny", *line]) == 0
    PartialState._reset_state()  # as cpu, for other tests
    return out


def test_what_the_real_commands_write_is_shown(real, capsys):
    assert main(["evaluate", "report", str(real)]) == 0
    assert "report.html; report.md and tables.tex are beside it" in capsys.readouterr().out
    text = (real / "report.html").read_text()
    rows = html_rows(text)
    results = json.loads((real / "dialogue.json").read_text())
    for name in ("a", "b"):
        mean = results["systems"][name]["metrics"]["dist1"]["mean"]
        assert any(row[0] == name and row[2].startswith(f"{mean:.3f}") for row in rows if len(row) == 4)
    rebuilt = json.loads((real / "reconstruction.json").read_text())["scores"]
    assert any(row[0] == "2 at once" and row[2] == f"{rebuilt['2']['bleu1']:.3f}" for row in rows)
    costs = json.loads((real / "efficiency" / "efficiency.json").read_text())["histories"]["4"]["arms"]
    assert any(row[0] == "4" and row[1] == str(costs["text"]["new_positions"]) for row in rows if len(row) == 5)
    missing = re.findall(r"<b>Missing:</b> ([^:.]*)", text)
    assert missing == [
        "Histograms of EmotionScore",
        "Comparisons of two systems",  # both clips with an emotion are of one conversation
        "Table 3&#x27;s own setting",
        "Table 2 (ablation)",
        "Human evaluation (Sec",
        "Contrast (does the reply follow the clip?)",
        "Judge (rubric, with the clip)",
    ]
    assert text.count("<article>") == 6 and text.count("data:video/mp4;base64,") >= 1
    labels = [
        "accuracy (%)",
        "predicted emotion (number of clips)",
        "prompt processing (ms)",
        "history (utterances)",
    ]
    for label in labels:
        assert f">{label}</text>" in text


# ------------------------------------------------------------------------------------------------------------ a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("There is no Chromium on this machine (Debian: apt install chromium).")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`).")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


OVERFLOWING = """[...document.querySelectorAll('body *')].filter((each) => each.getClientRects().length
    && !each.closest('.scroll, figure') && each.getBoundingClientRect().right > innerWidth + 0.5)
    .map((each) => each.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize(
    ("width", "scheme", "paper", "ink"),
    [
        (1280, "light", "rgb(255, 255, 255)", "rgb(28, 30, 33)"),
        (375, "dark", "rgb(22, 24, 28)", "rgb(228, 230, 234)"),
    ],
)
def test_the_page_in_a_browser(written, browser, violations, width, scheme, paper, ink):
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    problems, asked = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    link = (written / "report.html").as_uri()
    page.goto(link)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWING) == []
    # Wide tables scroll inside themselves, where there is no room for them.
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some((t) => t.scrollWidth > t.clientWidth)") is (
        width == 375
    )
    assert page.title() == "empathic: evaluation report" and problems == [] and asked == [link]
    assert page.evaluate("document.querySelector('script, img, article b, article i')") is None
    assert page.evaluate("[...document.querySelectorAll('dd')].map((each) => each.textContent)").count(EVIL) == 3
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert colours == [paper, ink]
    # Plots take the page's colour, and each axis says what it is.
    plots = page.evaluate(
        """[...document.querySelectorAll('svg')].map((svg) => [svg.getBoundingClientRect().height > 100,
            getComputedStyle(svg.querySelector('text')).fill, svg.querySelector('[id^="matplotlib.axis"]') !== null])"""
    )
    assert plots == [[True, ink, True]] * 6
    heard = "[...document.querySelectorAll('video')].map((each) => each.readyState >= 1 && each.error === null)"
    for _ in range(100):
        if page.evaluate(heard) == [True, True]:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(heard) == [True, True]
    assert violations(page) == []
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map((each) => each.hash.slice(1))")
    assert len(targets) > 3 and all(page.evaluate("(id) => document.getElementById(id) !== null", id) for id in targets)
    page.context.close()
