import base64
import json
import platform
import re
import shutil
import struct
import tomllib

import pytest
from nbformat import v4, write

from wuxia_core import mix
from wuxia_core.config import PROJECT
from wuxia_core.page import ABOVE, _fates
from wuxia_core.report import main, write_html

MESSAGES = PROJECT / "wuxia_core" / "messages"
LIVE = "<script>hit()</script><img src=x onerror=hit()>"


def exported(tmp_path, *cells):
    write(v4.new_notebook(cells=list(cells)), tmp_path / "x.ipynb")
    return write_html(tmp_path / "x.ipynb").read_text(encoding="utf-8").split("<body>")[1]


def test_markdown_keeps_tags_as_text_and_loses_links_that_run(tmp_path):
    source = f"{LIVE}\n\n[a](javascript:hit()) [b](01_x.ipynb)\n\n```mermaid\n{LIVE}\n```\n\u202e"
    page = exported(tmp_path, v4.new_markdown_cell(source), v4.new_raw_cell(LIVE))
    assert "<script" not in page and "<img" not in page and "javascript:" not in page
    assert page.count("&lt;script&gt;") == 2 and "⟨U+202E⟩" in page
    assert '<a href="01_x.html">b</a>' in page


@pytest.mark.parametrize("wrap", ["{}", "'{}'", "<td>{}</td>", "reading {}: 3 files", "x={}"])
def test_a_page_names_no_folder_of_this_machine(tmp_path, wrap):
    text = wrap.format("/home/me/rented_card/novels/雪.txt")
    printed = f"{text} https://a.b/c/d.txt 1/2/3 https://me:word@host hf_abc"
    outputs = [v4.new_output("display_data", {"text/html": text})]
    outputs.append(v4.new_output("stream", name="stdout", text=printed))
    page = exported(tmp_path, v4.new_code_cell(text, outputs=outputs))
    assert page.count("雪.txt") == 3 and "home" not in page and "rented" not in page
    assert "https://a.b/c/d.txt 1/2/3 https://***@host ***" in page and page.count("</td>") == (
        "td" in wrap
    )


def test_outputs_that_run_are_shown_as_text_or_not_at_all(tmp_path):
    svg = "image/svg+xml"
    bundles = [
        {"text/markdown": LIVE, "text/plain": "markdown"},
        {"text/latex": LIVE, "text/plain": "latex"},
        {"application/javascript": "hit()", "text/plain": LIVE},
        {svg: "<svg onload=hit()>", "text/plain": "\x1b[31msvg"},
        {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/html": "<b>view</b>"},
    ]
    outputs = [v4.new_output("display_data", bundle) for bundle in bundles]
    outputs.append(v4.new_output("stream", name="stdout", text=f"1%\r2%\n{LIVE}\x1b[2J"))
    page = exported(tmp_path, v4.new_code_cell(f'"{LIVE}"', outputs=outputs))
    assert "<script" not in page and "<img" not in page and "<svg" not in page
    for shown in ("markdown", "latex", "⟨U+001B⟩[31msvg", "<b>view</b>", ">2%\n", "⟨U+001B⟩[2J"):
        assert shown in page
    assert "1%" not in page


def test_a_notebooks_code_is_folded_and_what_was_logged_is_left_out(tmp_path):
    warning = v4.new_output("stream", name="stderr", text="x.py:1: FutureWarning: soon")
    code = v4.new_code_cell("print(1)", outputs=[warning])
    write(v4.new_notebook(cells=[v4.new_markdown_cell("# 掩码\n\nb"), code]), tmp_path / "x.ipynb")
    page = write_html(tmp_path / "x.ipynb").read_text(encoding="utf-8")
    assert "<title>掩码</title>" in page and "FutureWarning" not in page
    assert "<details><summary>code</summary><pre>print(1)</pre></details>" in page


@pytest.fixture(scope="module", params=["en", "zh"])
def run_page(request, short_run, tmp_path_factory):
    """The page of a run in a language, from a folder whose path would tell of its owner."""
    folder = tmp_path_factory.mktemp("owner") / "run"
    shutil.copytree(short_run[0], folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WUXIA_LANG", request.param)
        assert main([str(folder)]) == 0
    return request.param, folder / "index.html"


def test_a_runs_page_has_all_that_a_reader_asks_for(run_page, short_run):
    language, path = run_page
    page, scorecard = (
        path.read_text("utf-8"),
        json.loads((short_run[0] / "scorecard.json").read_text()),
    )
    heads = tomllib.loads((MESSAGES / f"{language}.toml").read_text("utf-8"))["page"]["heads"]
    assert re.findall("<h2>(.*?)</h2>", page) == list(heads.values())
    assert page.count("<ruby") == 2 * len(scorecard["passage"]["tokens"]) > 0
    assert page.count('<div class="pair"') == 3 and page.count("<dt>") == 3
    assert len(re.findall("<svg|<figure", page)) >= 7 and 'id="T_card"' in page
    assert ">射雕.pdf<" in page and ">空<" in page  # left out
    for said in ("三勺盐", "12,968", "training.<wbr>max_steps", "Burrows", "og:title"):
        assert said in page


def test_a_link_to_a_runs_page_has_a_picture(run_page):
    page = run_page[1].read_text("utf-8")
    (data,) = re.findall(r'"og:image" content="data:image/png;base64,(.*?)"', page)
    picture = base64.b64decode(data)
    assert picture[:4] == b"\x89PNG" and struct.unpack(">II", picture[16:24]) == (1200, 630)


def test_a_runs_page_can_be_sent_to_anybody(run_page):
    page = run_page[1].read_text("utf-8")
    assert len(page.encode()) < 4_000_000 and "default-src 'none'" in page
    assert not re.search(r"<script|\bsrc=|https?:|Warning|#000000|url\((?!#)", page)
    assert all(link.startswith("#") for link in re.findall(r'href="(.*?)"', page))
    assert not re.search(ABOVE, re.sub("<[^>]+>", " ", page))
    names = {platform.node(), "owner", "pytest"}
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", page)]


def test_a_book_is_trained_on_held_out_in_part_or_not_used(config, tmp_path):
    for name, weight in (("甲", 1), ("乙", 0)):
        (tmp_path / "novels").mkdir(exist_ok=True)
        chapters = [
            f"第{n}回 起\n" + f"{name}客拔剑{n}次，众人无不变色。\n" * 99 for n in range(1, 9)
        ]
        (tmp_path / "novels" / f"{name}.txt").write_text("\n".join(chapters), encoding="utf-8")
        config.data.weights[f"{name}.txt"] = weight
    config.data.data_dir, config.data.deduplicate = str(tmp_path / "novels"), False
    fates = _fates(mix(config))
    assert re.fullmatch(r"trained on, \d+% of it held out", fates["甲"]), fates
    assert fates["乙"] == "not used" or "held out" in fates["乙"], fates


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
