import unicodedata

import pandas as pd
import pytest

from wuxia_core import show
from wuxia_core.show import escape, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("剑光一闪，\n\t他……“Ｋ”、—𠂇!", "剑光一闪，\n\t他……“Ｋ”、—𠂇!"),
        ("a\x1b[31mb\rc\x00\x9b", "a⟨U+001B⟩[31mb⟨U+000D⟩c⟨U+0000⟩⟨U+009B⟩"),
        ("\u202e\u2066\u200f\u061c", "⟨U+202E⟩⟨U+2066⟩⟨U+200F⟩⟨U+061C⟩"),
        ("剑\u200b\u200d\u2060\ufeff\ufe0f", "剑⟨U+200B⟩⟨U+200D⟩⟨U+2060⟩⟨U+FEFF⟩⟨U+FE0F⟩"),
        ("\ue000\u0378\u2028\U000e0041", "⟨U+E000⟩⟨U+0378⟩⟨U+2028⟩⟨U+E0041⟩"),
    ],
)
def test_what_acts_on_the_display_is_shown_by_its_number(text, shown):
    assert visible(text) == escape(text).replace("&quot;", '"') == shown


def test_every_invisible_character_is_shown():
    acting = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    for character in map(chr, range(0x110000)):
        acts = unicodedata.category(character) in acting and character not in "\n\t"
        assert not acts or visible(character) == f"⟨U+{ord(character):04X}⟩"


def test_tables_escape_cells_and_headings_and_stay_so_when_formatted():
    rows = pd.DataFrame({"<b>": ["<i>\u202e", None], "n": [1234, 5]})
    for styler in (show.table(rows), show.table(rows).format({"n": "{:.1f}"})):
        html = styler.to_html()
        assert "<b>" not in html and "<i>" not in html
        assert "&lt;b&gt;" in html and "&lt;i&gt;⟨U+202E⟩" in html
        assert "mathjax_ignore" in html.split("<thead>")[0]
    assert "1,234" in show.table(rows).to_html()


def test_titles_in_plots_are_no_mathematics_and_have_glyphs(recwarn):
    title = "$\\undefined$ \u202e\ue000\U0001f5e1剑"
    index = pd.MultiIndex.from_tuples([("wuxia", title)])
    ax = show.plot_bars(pd.DataFrame({"train": [9]}, index), xlabel="characters")
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["$\\undefined$ ⟨U+202E⟩⟨U+E000⟩⟨U+1F5E1⟩剑"]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
