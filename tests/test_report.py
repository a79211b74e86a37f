import pytest
from nbformat import v4, write

from wuxia_core.report import export

LIVE = "<script>hit()</script><img src=x onerror=hit()>"


def exported(tmp_path, *cells):
    write(v4.new_notebook(cells=list(cells)), tmp_path / "x.ipynb")
    return export(tmp_path / "x.ipynb").read_text(encoding="utf-8").split("<body>")[1]


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
