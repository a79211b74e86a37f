"""What only a real browser can tell: widgets, colours, and that text from outside never runs."""

import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbformat.sign import NotebookNotary
from peft import LoraConfig, get_peft_model

from wuxia_core.config import PROJECT, locate
from wuxia_core.corpus import RULES, clean
from wuxia_core.model import load_base
from wuxia_core.report import NOTEBOOKS, run
from wuxia_core.show import FILL
from wuxia_core.text import visible
from wuxia_core.write import STRONGEST

pytestmark = pytest.mark.browser

PAYLOADS = [
    "\u202e逆行\u2066",
    "[按此](javascript:hit('markdown'))",
    "<svg/onload=hit('svg')>",
    r"$$\alpha$$ \(\beta\) \[\gamma\] $\delta$ \begin{equation}\epsilon\end{equation}",
    "<script>hit('script')</script>",
    "<img src=x onerror=hit('image')>",
    "</pre></div></style></table></title><script>hit('breakout')</script>",
    "\"'><iframe srcdoc='<script>parent.hit(`frame`)</script>'></iframe>",
    "<a href=\"javascript:hit('link')\">按此</a>",
    "<x-y/style='position:fixed;inset:0'/onclick=hit('click')>",
    "&lt;script&gt;hit('entity')&lt;/script&gt;",
    "# 题 **粗** `码` | 甲 | ~~删~~ <https://example.invalid> ]]> {{ 7*7 }}{% raw %}{7}",
    "剑\u200b光\u2060影",
    "\x1b[31m红\x1b[2J\x1b]8;;javascript:hit()\x07旧\x08新\x9b31m",
]
PATIENCE = 120_000  # milliseconds
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false", "checkForUpdates": False
    },
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}  # fmt: skip
# The text of every text node that is seen below an element, with its contrast to what is behind it.
CONTRASTS = """(selector) => {
  const parse = (colour) => {
    const found = colour.match(/^rgba?\\(([^)]+)\\)$/);
    if (!found) throw new Error(`cannot read the colour ${colour}`);
    const [r, g, b, alpha = 1] = found[1].split(/[ ,/]+/).map(Number);
    return { rgb: [r, g, b], alpha };
  };
  const over = (top, below) => below.map((c, i) => top.rgb[i] * top.alpha + c * (1 - top.alpha));
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.background = "Canvas";
  const canvas = parse(getComputedStyle(probe).backgroundColor).rgb;
  probe.remove();
  const behind = (element) => {
    if (!element) return canvas;
    const style = getComputedStyle(element);
    if (style.opacity !== "1" || style.backgroundImage !== "none" || style.filter !== "none")
      throw new Error(`cannot tell what is seen in ${element.outerHTML.slice(0, 200)}`);
    return over(parse(style.backgroundColor), behind(element.parentElement));
  };
  const walker = document.createTreeWalker(
    document.querySelector(selector ?? "body"), NodeFilter.SHOW_TEXT
  );
  const found = [], range = document.createRange();
  while (walker.nextNode()) {
    const node = walker.currentNode;
    range.selectNodeContents(node);
    if (!node.data.trim() || !range.getClientRects().length) continue;
    const back = behind(node.parentElement);
    const front = over(parse(getComputedStyle(node.parentElement).color), back);
    const [dark, light] = [luminance(front), luminance(back)].sort((a, b) => a - b);
    found.push({ text: node.data.slice(0, 40), contrast: (light + 0.05) / (dark + 0.05) });
  }
  return found;
}"""
# The characters that look like one that no font has, in any of the fonts that the page uses.
BOXES = """(extra) => {
  const canvas = new OffscreenCanvas(48, 48);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const draw = (font, character) => {
    context.font = font;
    context.clearRect(0, 0, 48, 48);
    context.fillText(character, 8, 36);
    return context.getImageData(0, 0, 48, 48).data.join();
  };
  const fonts = new Map(), boxes = new Set();
  for (const element of document.body.querySelectorAll("*"))
    for (const node of element.childNodes)
      if (node.nodeType === Node.TEXT_NODE && element.getClientRects().length) {
        const font = `24px ${getComputedStyle(element).fontFamily}`;
        if (!fonts.has(font)) fonts.set(font, new Set(extra));
        for (const character of node.data) if (character.trim()) fonts.get(font).add(character);
      }
  for (const [font, characters] of fonts) {
    const missing = new Set(["\\u0378", "\\ufdd0"].map((character) => draw(font, character)));
    for (const c of characters) if (missing.has(draw(font, c))) boxes.add(c);
  }
  return [...boxes];
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium fonts-noto-cjk")
    fonts = shutil.which("fc-list") and subprocess.check_output(["fc-list", ":lang=zh-cn"])
    if not fonts:
        pytest.skip("no Chinese font: apt-get install fonts-noto-cjk")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=program, args=CHROMIUM)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback: its folder and its address with {} for a notebook's name."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "settings"):
        (root / name).mkdir()
    (root / "settings" / "overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    token = secrets.token_hex()
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
           "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")  # fmt: skip
    environment = os.environ | {name: str(root / name) for name in own}
    environment |= {"JUPYTER_TOKEN": token, "PYTHONPATH": str(PROJECT)}
    arguments = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
                 f"--ServerApp.root_dir={root / 'notebooks'}",
                 f"--LabApp.app_settings_dir={root / 'settings'}",
                 "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with (root / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], env=environment, stderr=log
        )
    try:
        port = _port(root / "JUPYTER_RUNTIME_DIR", server)
        yield root, f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
    finally:
        server.terminate()
        server.wait(20)


def _port(folder: Path, server: subprocess.Popen) -> int:
    for _ in range(PATIENCE // 100):
        for path in folder.glob("jpserver-*.json"):
            with suppress(OSError, ValueError):  # the file may be there before the server listens
                port = json.loads(path.read_text())["port"]
                socket.create_connection(("127.0.0.1", port), 1).close()
                return port
        assert server.poll() is None, "JupyterLab ended"
        time.sleep(0.1)
    raise TimeoutError("JupyterLab did not start in time")


@pytest.fixture
def page(browser):
    """Open a page that notes in `page.said` whatever it says, and whatever `hit` is called with."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.expose_function("hit", lambda name="": page.said.append(f"hit {name}"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Notebook 02 executed and exported; the HTML."""
    return run("02_see_masks", {}, tmp_path_factory.mktemp("masks"))


def open_notebook(page, lab, notebook: nbformat.NotebookNode, trusted: bool = False) -> None:
    """Write a notebook to where JupyterLab looks, and open it."""
    root, address = lab
    name = f"{secrets.token_hex(4)}.ipynb"
    notebook.metadata["copy"] = name  # trust goes by the content
    nbformat.write(notebook, root / "notebooks" / name)
    if trusted:
        notary = NotebookNotary(data_dir=str(root / "JUPYTER_DATA_DIR"))
        notary.sign(nbformat.read(root / "notebooks" / name, 4))
        notary.store.close()
    page.goto(address.format(name))
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady")


# The texts that stand on a colour.
COLOURED = """(colour) => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.background = colour;
  const wanted = getComputedStyle(probe).backgroundColor;
  probe.remove();
  return [...document.querySelectorAll("[lang=zh-Hans] span")]
    .filter((span) => getComputedStyle(span).backgroundColor === wanted)
    .map((span) => span.textContent);
}"""
EXPLORED = ".jp-OutputArea-output .widget-html-content [lang=zh-Hans]"


def test_masks_follow_a_slider_moved_by_keyboard(page, lab):
    open_notebook(page, lab, nbformat.read(NOTEBOOKS / "02_see_masks.ipynb", 4))
    page.evaluate("jupyterapp.commands.execute('runmenu:run-all')")
    view = page.locator(EXPLORED).nth(2)  # behind the two of the sentence box
    view.wait_for(timeout=PATIENCE)
    before = view.locator("div").last.text_content()
    page.locator(".widget-slider", has_text="passage").locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([selector, before]) => "
        "!document.querySelectorAll(selector)[2].textContent.includes(before)",
        arg=[EXPLORED, before],
        timeout=PATIENCE,
    )
    text = clean(locate("data/sample/九两八钱.txt").read_text(encoding="utf-8"))[0]
    assert text.index(before) == 0
    assert text.index(view.locator("div").last.text_content()) == len(before)


@pytest.mark.parametrize("trusted", [True, False])
def test_masks_keep_their_colours_whether_trusted_or_not(page, lab, masks, trusted):
    open_notebook(page, lab, nbformat.read(masks.with_suffix(".ipynb"), 4), trusted)
    page.wait_for_selector("[lang=zh-Hans] span")
    cells = "jupyterapp.shell.currentWidget.content.widgets.filter((cell) => cell.outputArea)"
    assert page.evaluate(f"{cells}.every((cell) => cell.model.trusted)") == trusted
    for colour in FILL.values():
        marked = page.evaluate(COLOURED, colour)
        assert len(marked) > 10 and any("\u4e00" <= text[0] <= "\u9fff" for text in marked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_can_be_read(page, masks, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(masks.as_uri())
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200 and [row for row in found if row["contrast"] < 4.5] == []
    assert all(len(page.evaluate(COLOURED, colour)) > 10 for colour in FILL.values())
    assert page.evaluate(BOXES, "𠂇\u0378") == ["\u0378"]
    assert page.said == []
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of an adapter that was never trained, but changes what is written."""
    lora = LoraConfig(target_modules="all-linear", lora_alpha=64, init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    base = load_base("data/tiny_base", torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(base, lora).save_pretrained(folder)
    return str(folder)


WRITTEN = ".widget-html-content [lang=zh-Hans]"


def wait_until_written(page) -> list[str]:
    """Wait until the desk has written; what the view said in the meantime."""
    seen, done = [], page.locator("button:enabled", has_text="keep")
    for _ in range(PATIENCE // 50):
        if done.count():
            return seen
        seen += page.locator(WRITTEN).all_text_contents()
        page.wait_for_timeout(50)
    raise TimeoutError("not written in time")


def test_a_typed_prompt_is_taken_up_and_a_slider_changes_how(page, lab, adapter):
    notebook = nbformat.read(NOTEBOOKS / "07_write.ipynb", 4)
    settings = f"output_dir, prompts, tokens = {adapter!r}, ['剑光'], 100"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(settings))
    open_notebook(page, lab, notebook)
    page.evaluate("jupyterapp.commands.execute('runmenu:run-all')")
    typed = "夜雨敲窗，" + "".join(PAYLOADS[1:7])
    page.locator(".widget-textarea textarea").fill(typed, timeout=PATIENCE)
    write, passages = page.locator("button", has_text="write"), page.locator(f"{WRITTEN} div div")
    write.click()
    assert len(set(wait_until_written(page))) > 5  # as it is made
    base, tuned = passages.all_text_contents()
    assert base.startswith(typed) and tuned.startswith(typed) and base != tuned

    page.locator(".widget-slider", has_text="strength").locator(".noUi-handle").focus()
    page.keyboard.press("End")
    write.click()
    page.locator(WRITTEN, has_text=f"strength {STRONGEST:g} ").wait_for()
    wait_until_written(page)
    assert passages.first.text_content() == base
    assert passages.last.text_content().startswith(typed) and passages.last.text_content() != tuned
    page.locator("button", has_text="keep").click()
    page.locator(".widget-html-content td", has_text=typed).wait_for()
    assert page.evaluate(LIVE, ".widget-html-content") == []
    assert [said for said in page.said if said.startswith("hit")] == []
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
        page.wait_for_timeout(2000)
        for part in (WRITTEN, ".widget-html-content table"):
            found = page.evaluate(CONTRASTS, part)
            assert len(found) > 5 and [row for row in found if row["contrast"] < 4.5] == []


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_run_all_leaves_no_bars_and_no_red_boxes(page, lab, short_run, tmp_path, name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    own = {"output_dir": str(short_run[0]), "output": str(tmp_path / "mixture")}
    lines = [f"{key} = {own[key]!r}" for key in own if f"{key}: " in notebook.cells[1].source]
    notebook.cells.insert(2, nbformat.v4.new_code_cell("\n".join(lines) or "0"))
    open_notebook(page, lab, notebook)
    page.evaluate("jupyterapp.commands.execute('runmenu:run-all')")
    cells = "jupyterapp.shell.currentWidget.content.widgets.filter((c) => c.model.type === 'code')"
    page.wait_for_function(f"{cells}.every((c) => c.model.executionCount)")
    outputs = page.evaluate(f"{cells}.map((c) => c.model.outputs.toJSON()).flat()")
    assert len(outputs) >= 2
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    assert "%|" not in page.text_content(".jp-Notebook")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, adapter):
    """Notebooks executed on a novel, and on prompts, that attack; the folder of what they wrote."""
    root = tmp_path_factory.mktemp("attacked")
    title = "$$x$$ <img src=x onerror=hit('title')> 剑\u202e\x1b[31m"
    lines = locate("data/sample/九两八钱.txt").read_text(encoding="utf-8").splitlines()
    payloads = itertools.chain(
        PAYLOADS, itertools.cycle(PAYLOADS[:-1])
    )  # few controls: else no text
    attack = "\n".join(f"{line}\n{next(payloads)}。" if line.strip() else "" for line in lines)
    for path in (f"novels/{title}.txt", f"general/a{title}.txt"):
        (root / path).parent.mkdir()
        (root / path).write_text(attack, encoding="utf-8")
    shutil.copy(locate("data/sample/三勺盐.txt"), root / "novels")
    settings = yaml.safe_load(locate("configs/sample.yaml").read_text(encoding="utf-8"))
    settings["data"]["skip_cleaning"] = list(RULES)
    (root / "raw.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    texts = {"data_dir": str(root / "novels"), "general_file": str(root / "general")}
    run("01_explore_corpus", texts | {"output": str(root / "clean")}, root)
    book = {"book_file": str(root / f"novels/{title}.txt"), "characters": 3000}
    run("02_see_masks", book | {"seed": 1}, root)
    raw = {"output": str(root / "raw"), "config": str(root / "raw.yaml")}
    run("03_mix_corpora", texts | raw, root)
    run("07_write", {"output_dir": adapter, "prompts": PAYLOADS, "tokens": 4}, root)
    return root


ATTACKED = ["01_explore_corpus", "02_see_masks", "03_mix_corpora", "07_write"]
SHOWN = ["⟨U+202E⟩逆行⟨U+2066⟩", *PAYLOADS[1:3], "$$"]  # in every notebook

# What is live below an element of this selector, by its HTML.
LIVE = """(selector) => [...document.querySelectorAll(`${selector} *`)].filter((element) =>
  ["SCRIPT", "IFRAME", "OBJECT", "EMBED", "SVG", "X-Y"].includes(element.tagName.toUpperCase())
  || [...element.attributes].some((attribute) => attribute.name.startsWith("on"))
  || /^\\s*javascript:/i.test(element.getAttribute("href") ?? "")
  || (element.tagName === "IMG" && !element.src.startsWith("data:"))
).map((element) => element.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("name", ATTACKED)
def test_text_from_outside_does_nothing_in_a_report(page, attacked, name):
    page.goto((attacked / f"{name}.html").as_uri())
    page.wait_for_timeout(200)
    assert page.said == [] and page.evaluate(LIVE, "body") == []
    text = page.text_content("body")
    shown = SHOWN[1:] if name == "02_see_masks" else SHOWN  # its passage is cleaned
    assert visible(text) == text and all(payload in text for payload in shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ATTACKED)
def test_a_report_fits_a_narrow_screen(page, attacked, name, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto((attacked / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert [row for row in page.evaluate(CONTRASTS) if row["contrast"] < 4.5] == []


@pytest.mark.parametrize("trusted", [True, False])
def test_text_from_outside_does_nothing_in_a_notebook(page, lab, attacked, trusted):
    notebook, *others = (nbformat.read(attacked / f"{name}.ipynb", 4) for name in ATTACKED)
    for other in others:
        notebook.cells += other.cells
    control = nbformat.v4.new_output("display_data", {"text/html": "<p>$$control$$</p>"})
    notebook.cells.append(nbformat.v4.new_code_cell("1", outputs=[control]))
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
    open_notebook(page, lab, notebook, trusted)
    page.wait_for_selector(".jp-OutputArea-output mjx-container")
    page.wait_for_timeout(500)
    assert page.locator(".jp-OutputArea-output mjx-container").count() == 1  # the control
    text = page.text_content(".jp-Notebook")
    assert all(text.count(payload) >= len(ATTACKED) for payload in SHOWN)
    assert page.evaluate(LIVE, ".jp-OutputArea-output") == []
    assert [said for said in page.said if said.startswith("hit")] == []


# Pixels that the words of plots and the guesses of the X-ray are high.
HEIGHTS = """() => [...document.querySelectorAll("svg text, rt")]
  .filter((words) => words.textContent.trim()).map((words) => {
    const { a, b } = words.getScreenCTM?.() ?? { a: 1, b: 0 };
    return Math.hypot(a, b) * parseFloat(getComputedStyle(words).fontSize);
  })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_of_a_run_fits_and_can_be_read(page, short_run, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((short_run[0] / "index.html").as_uri())
    page.locator("details").evaluate("(fold) => { fold.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100 and [row for row in found if row["contrast"] < 4.5] == []
    assert min(page.evaluate(HEIGHTS)) >= 10 and page.said == []
