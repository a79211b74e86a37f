import random
import re
import tracemalloc

import pytest

from wuxia_core.corpus import (
    DuplicateIndex,
    FileReport,
    clean,
    find_files,
    read_book,
    read_documents,
)
from wuxia_core.corpus.overlap import GRAM, HeldOutNgrams, Leakage, drop_sentences

COMMON = "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家"


def prose(name, sentences=200):
    rng = random.Random(name)
    return "\n".join(
        "".join(rng.choices(COMMON, k=60)) + "。" for _ in range(sentences)
    )  # a paragraph each


def sketches(**books):
    found = DuplicateIndex()
    for title, text in books.items():
        found.add(text, title)
    return found


def test_an_edition_is_found_whatever_its_punctuation_and_the_longer_one_kept():
    text = prose("甲")
    other = text.replace("。", ".")[: int(len(text) * 0.7)]
    found = sketches(乙=prose("乙"), 短=other, 甲=text).same_books()
    assert [(same.book, same.kept) for same in found] == [("短", "甲")]
    assert found[0].share > 0.95


def test_books_that_share_a_part_are_two_books():
    shared = prose("共", 80)
    books = {title: f"{prose(title)}\n{shared}" for title in "甲乙"}
    found = sketches(**books)
    assert found.same_books() == []
    repeats = found.same_paragraphs()
    assert len(repeats) == 80 and set(repeats["document"]) == {1}
    assert set(repeats["kept_document"]) == {0}


def test_a_traditional_edition_gives_way_to_the_simplified_one():
    simplified = "老镖师独自坐在门前磨刀，忽听得远处马蹄声急，心中一惊，暗道来者必是仇家。"
    traditional = "老鏢師獨自坐在門前磨刀，忽聽得遠處馬蹄聲急，心中一驚，暗道來者必是仇家。"
    body = prose("甲", 3)
    found = sketches(旧=(traditional + body) * 9, 新=(simplified + body) * 9).same_books()
    assert [(same.book, same.kept) for same in found] == [("旧", "新")]


def test_repeats_are_exact_or_near_and_short_lines_may_stand_twice():
    lines = prose("甲", 30).split("\n")
    near = lines[3][:30] + "变" + lines[3][31:]
    text = "\n".join([*lines, lines[5], near, "不知后事如何，且听下回分解。"] * 1)
    found = sketches(
        甲=text, 乙="不知后事如何，且听下回分解。\n" + prose("乙", 5)
    ).same_paragraphs()
    pairs = set(zip(found["line"], found["kept_line"], strict=True))
    assert (30, 5) in pairs and pairs <= {(30, 5), (31, 3)}
    assert sketches(甲=text).same_paragraphs(leaving_out=[0]).empty
    assert DuplicateIndex().same_books() == [] and DuplicateIndex().same_paragraphs().empty


def test_real_editions_and_no_other_pair(novels, tmp_path):
    for name in ("wuxia", "messy"):
        (tmp_path / name).symlink_to(novels / name)
    found = DuplicateIndex()
    for file in find_files(tmp_path, None):
        for document in read_documents(FileReport(file)):
            found.add(document.text, document.book)
    pairs = {(same.book, same.kept) for same in found.same_books()}
    assert pairs == {
        ("messy/水浒传_utf8_网站广告", "wuxia/水浒传"),
        ("messy/水浒传_gbk_硬换行_广告", "wuxia/水浒传"),
        ("messy/七劍十三俠_big5", "wuxia/七剑十三侠"),
        ("messy/三俠五義_big5", "wuxia/三侠五义"),
    }


def test_shared_sentences_leave_held_out_text():
    shared = "不知后事如何，且听下回分解，正是山雨欲来风满楼。"
    held_out = f"{prose('甲', 3)}\n{shared}\n{prose('丙', 3)}"
    training = f"他说：{shared}{prose('乙', 5)}"
    runs = HeldOutNgrams([held_out])
    assert not runs.shared(held_out).any()
    runs.update(training)
    flags = runs.shared(held_out)
    found = Leakage()
    found.add(flags)
    assert found.shared == len(shared) - GRAM + 1 and found.longest == len(shared)
    left = drop_sentences(held_out, flags)
    assert left == f"{prose('甲', 3)}\n{prose('丙', 3)}"
    assert not runs.shared(left).any()


def test_held_out_text_that_shares_nothing_stays(novels):
    texts = [
        clean(read_book(novels / "wuxia" / f"{n}.txt").text)[0] for n in ("绿牡丹", "三侠五义")
    ]
    runs = HeldOutNgrams(texts[:1])
    runs.update(texts[1])
    flags = runs.shared(texts[0])
    assert 0 < flags.mean() < 0.002
    left = drop_sentences(texts[0], flags)
    assert len(left) > 0.98 * len(texts[0]) and not runs.shared(left).any()
    with pytest.raises(IndexError):
        drop_sentences("", flags)


def test_of_two_like_paragraphs_the_one_that_holds_more_is_kept():
    short, more = prose("甲", 1), prose("乙", 1)[:20]
    found = sketches(甲=f"{short}\n{prose('丙', 3)}\n{more}{short}").same_paragraphs()
    assert found.to_numpy().tolist() == [[0, 0, 0, 4]]


def pieces(name, count):
    """So many paragraphs of a thousand random characters, which no other name gives."""
    rng = random.Random(name)
    return ["".join(chr(rng.randrange(0x4E00, 0x9F00)) for _ in range(1000)) for _ in range(count)]


def editions(seed):
    """Two that share sixteen pieces with two others, but with each other most of what they are."""
    text, own, end = (pieces(f"{name}{seed}", 40) for name in ("文", "别", "尾"))
    books = {
        "甲": text[:18] + own[:30],
        "乙": text[:40] + end[:3],
        "丁": text[:18] + own[:5] + text[18:36],
        "丙": text[:16] + text[18:34] + end[10:18],
    }
    return {name: "\n".join(parts) for name, parts in books.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("without", ["", "甲", "丁", "甲丁"])
def test_a_third_edition_between_two_does_not_hide_their_likeness(seed, without):
    books = {name: text for name, text in editions(seed).items() if name not in without}
    assert {"丙", "乙"} in [{same.book, same.kept} for same in sketches(**books).same_books()]


def test_every_two_of_many_that_share_a_passage_are_compared():
    shared, text = pieces("共", 3), pieces("二", 6)
    books = {f"书{n}": "\n".join(pieces(f"书{n}", 5) + shared) for n in range(300)}
    for n in (77, 211):
        books[f"书{n}"] = "\n".join([*shared, *text])
    found = sketches(**books)
    pairs = [{same.book, same.kept} for same in found.same_books()]
    assert pairs == [{"书77", "书211"}]
    assert set(found.same_paragraphs().query("document == 211")["line"]) == set(range(9))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs():
    """Five thousand books of one passage are 12 million pairs."""
    shared, found = pieces("共", 1)[0], DuplicateIndex()
    for number in range(5000):
        own = random.Random(number).choices(COMMON, k=400)
        found.add(f"{shared[: 400 + number % 300]}{number}\n{''.join(own)}", f"书{number}")
    tracemalloc.start()
    found.same_books()
    found.same_paragraphs()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


CHAPTERS = [prose(f"章{n}", 30) for n in range(20)]
UNWRAPPED = "\n".join(CHAPTERS)
WRAPPED = "\n".join(re.findall(".{1,35}", UNWRAPPED))
POSTER = "更多精彩小说尽在雪岭书屋欢迎各位书友前来阅读收藏推荐本站永久免费"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (
            [(f"第{n}章", f"第{n}章\n{text}") for n, text in enumerate(CHAPTERS)],
            [(f"part {n}", f"{text}\n{prose(f'多{n}', 1)}") for n, text in enumerate(CHAPTERS)],
        ),
        ([("", UNWRAPPED)], [("", WRAPPED + prose("多", 9))]),
        ([("", UNWRAPPED)], [("", UNWRAPPED.replace("。\n", f"。{POSTER}\n"))]),
        ([("", UNWRAPPED)], [("", UNWRAPPED.replace("不", "\ufffd") + prose("多", 9))]),
        (
            [("", UNWRAPPED)],
            [("", UNWRAPPED.replace("家。", "www.xueling.com。") + prose("多", 9))],
        ),
        ([("", UNWRAPPED + prose("多", 9))], [("", UNWRAPPED)]),
    ],
    ids=["chapters", "paragraphs", "advertisements", "damage", "addresses", "longer"],
)
@pytest.mark.parametrize("names", ["甲乙", "乙甲"])
def test_the_better_edition_is_kept(better, worse, names):
    found = DuplicateIndex()
    for name, chapters in zip(names, (better, worse), strict=True):
        for heading, text in chapters:
            found.add(text, name, heading)
    assert [(same.kept, same.book) for same in found.same_books()] == [tuple(names)]
