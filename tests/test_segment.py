from pathlib import Path

import numpy as np
import pytest

from wuxia_core.corpus import Segmenter, read_lexicon
from wuxia_core.errors import ConfigError

LEXICON = Path(__file__).parents[1] / "data" / "lexicon.txt"
GBK = "白鹤亮翅".encode("gbk").decode(errors="replace")
ALPHABET = [*"白鹤亮翅使一招的，。“”a1 \t\n\r\0\x1b\u2028\u3000\ufeff\ue000㐀𠮷😀", "👨‍👩‍👧"]


@pytest.mark.parametrize("seed", range(20))
def test_the_words_join_to_the_text(seed):
    drawn = np.random.default_rng(seed).integers(len(ALPHABET), size=500)
    letters = [ALPHABET[i] for i in drawn]
    text = "".join(letters)
    lexicon = {"".join(letters[n : n + 3]) for n in range(0, 500, 50)}
    assert "".join(Segmenter(lexicon).cut(text)) == text
    assert "".join(Segmenter().cut(text)) == text


@pytest.mark.parametrize("text", ["", "白", "白鹤亮翅"])
def test_texts_without_neighbours(text):
    assert Segmenter(["白鹤亮翅"]).cut(text) == ([text] if text else [])


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("白鹤亮翅", "少年使一招白鹤亮翅攻向那大汉。"),
        ("宋江", "宋江便道：且慢。"),
        ("阿·依古丽", "姑娘阿·依古丽笑了。"),
        ("𠮷祥铺", "他住𠮷祥铺里。"),
    ],
)
def test_a_word_of_the_lexicon_is_kept_where_rjieba_cuts_it_or_joins_it(word, sentence):
    assert word not in Segmenter().cut(sentence)
    assert word in Segmenter([word]).cut(sentence)


def test_the_longest_match_wins():
    words = Segmenter(["连环腿", "鸳鸯连环", "鸳鸯连环腿"]).cut("一记鸳鸯连环腿踢出")
    assert "鸳鸯连环腿" in words


def test_of_matches_that_overlap_the_first_wins():
    assert Segmenter(["丙丁戊己", "甲乙丙"]).cut("甲乙丙丁戊己")[0] == "甲乙丙"


def test_no_segmenter_sees_the_words_of_another():
    text = "使一招白鹤亮翅，又一招黑虎掏心"
    alone = Segmenter().cut(text)
    cranes, tigers = Segmenter(["白鹤亮翅"]), Segmenter(["黑虎掏心"])
    assert {"白鹤亮翅", "黑虎掏心"} & {*cranes.cut(text)} == {"白鹤亮翅"}
    assert {"白鹤亮翅", "黑虎掏心"} & {*tigers.cut(text)} == {"黑虎掏心"}
    assert Segmenter().cut(text) == alone


def test_the_order_of_the_lexicon_does_not_matter():
    lexicon = ["白鹤", "白鹤亮翅", "亮翅攻", "一招白", "鹤亮"]
    text = "使一招白鹤亮翅攻向白鹤，鹤亮翅攻"
    orders = [np.random.default_rng(seed).permutation(lexicon).tolist() for seed in range(10)]
    assert len({tuple(Segmenter(order).cut(text)) for order in orders}) == 1


def test_a_lexicon_may_hold_comments_a_mark_and_spaces_around_words(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_bytes("\ufeff# 招式\r\n白鹤亮翅 \r\n\u3000黑虎掏心".encode())
    assert read_lexicon(path) == ("白鹤亮翅", "黑虎掏心")


@pytest.mark.parametrize(
    ("content", "place", "word"),
    [
        ("甲乙\n\n丙丁\n", 2, ""),
        ("甲乙\n \u3000\n", 2, ""),
        ("甲乙 3 n\n", 1, "甲乙 3 n"),
        ("断雁十三剑，白鹤亮翅\n", 1, "断雁十三剑，白鹤亮翅"),
        ("甲乙\n断雁十三剑、白鹤亮翅", 2, "断雁十三剑、白鹤亮翅"),
        ("白鹤亮翅|黑虎掏心", 1, "白鹤亮翅|黑虎掏心"),
        ("白鹤亮翅,黑虎掏心", 1, "白鹤亮翅,黑虎掏心"),
        ("“白鹤亮翅”", 1, "“白鹤亮翅”"),
        ("白鹤\u200b亮翅", 1, "白鹤\u200b亮翅"),
        ("甲乙\n剑\n", 2, "剑"),
        ("甲乙\n丙丁\n".encode() + b"\xb0\xd7\n", 3, "\ufffd\ufffd"),
        ("# 招式\n白鹤亮翅\n".encode("gbk"), 2, GBK),
    ],
)
def test_a_line_that_is_no_word_is_refused_with_what_a_word_is(tmp_path, content, place, word):
    path = tmp_path / "lexicon.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_lexicon(path)
    assert str(error.value).startswith(f"data.lexicon {path}:{place}: {word!r} is no word; write")
    for remedy in ("one word a line", "two characters or more", "UTF-8", "delete the line"):
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "# 甲乙\n"])
def test_a_lexicon_without_a_word_is_refused(tmp_path, content):
    path = tmp_path / "lexicon.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_lexicon(path)
    assert str(error.value).startswith(f"data.lexicon {path}: holds no word; write one a line")


def test_a_word_may_stand_there_twice(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("白鹤亮翅\n宋江\n白鹤亮翅\n", encoding="utf-8")
    assert Segmenter(read_lexicon(path)).cut("宋江白鹤亮翅") == ["宋江", "白鹤亮翅"]


def test_names_with_a_point_a_hyphen_or_digits_are_words(tmp_path):
    words = ("阿·依古丽", "让-保罗", "Ａ计划", "𠮷祥铺", "第3式")
    (tmp_path / "lexicon.txt").write_text("\n".join(words), encoding="utf-8")
    assert read_lexicon(tmp_path / "lexicon.txt") == words


def test_a_lexicon_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.lexicon .*none\.txt: cannot be read \(No such"):
        read_lexicon(tmp_path / "none.txt")


def test_the_lexicon_that_comes_with_the_project_reads():
    assert len(read_lexicon(LEXICON)) > 100
