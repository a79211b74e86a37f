import functools
from difflib import SequenceMatcher

import numpy as np
import pytest

from wuxia_core import corpus
from wuxia_core.evaluate.copying import longest_runs, overlap

PHRASE = "话说那少年见了此剑不觉大惊失色道此剑乃先师遗物如何落在你手那老者"


def against(texts, *documents):
    return overlap(texts, lambda: [(f"书 · {n}", text) for n, text in enumerate(documents, 1)])


def plain_longest(text, documents):
    """Longest common substring by dynamic programming over the ends of both."""
    longest = 0
    for document in documents:
        before = [0] * (len(document) + 1)
        for a in text:
            row = [0] + [n + 1 if a == b else 0 for n, b in zip(before, document, strict=False)]
            longest, before = max(longest, *row), row
    return longest


def test_a_passage_and_where_it_stands():
    row = against(["一剑光寒"], "无关的话", "他说：\n剑光！").iloc[0]
    assert (row["length"], row["title"]) == (2, "书 · 2")
    assert (row["generated"], row["source"]) == ("一【剑光】寒", "他说：【剑光】！")
    assert not row["flagged"]


def test_the_first_document_with_the_longest_passage_is_named():
    row = against(["甲乙丙丁"], "甲乙", "丁甲乙丙", "甲乙丙").iloc[0]
    assert (row["length"], row["title"]) == (3, "书 · 2")


def run(row, column):
    """Give the shared run of a row, out of its brackets."""
    return row[column].partition("【")[2].partition("】")[0]


@pytest.mark.parametrize("alphabet", ["ab", "abc", "abcdefgh"])
def test_lengths_are_those_of_a_plain_search(alphabet):
    rng = np.random.default_rng(len(alphabet))

    def some(count):
        return ["".join(rng.choice(list(alphabet), rng.integers(0, 90))) for _ in range(count)]

    texts, documents = some(30), some(12)
    table = against(texts, *documents)
    for text, row in zip(texts, table.to_dict("records"), strict=True):
        assert row["length"] == len(run(row, "generated")) == plain_longest(text, documents)
        assert run(row, "generated") == run(row, "source")
        if row["length"]:
            there = documents[int(row["title"].split()[-1]) - 1]
            assert row["source"].replace("【", "").replace("】", "") in there
            assert row["generated"].replace("【", "").replace("】", "") in text


def test_white_space_and_composition_do_not_hide_a_copy():
    text = f"\u3000\u3000caf\u00e9，{PHRASE[:10]}\n\u3000\u3000{PHRASE[10:]}"
    row = against([text], f"cafe\u0301，{PHRASE}").iloc[0]
    assert row["length"] == 5 + len(PHRASE)


def test_nothing_runs_across_documents_or_texts():
    row = against([PHRASE], PHRASE[:9], PHRASE[9:]).iloc[0]
    assert row["length"] == len(PHRASE) - 9
    assert against([PHRASE[:9], PHRASE[9:]], PHRASE)["length"].tolist() == [9, len(PHRASE) - 9]


def test_thirty_characters_are_flagged():
    table = against([PHRASE[:29], PHRASE[:30]], PHRASE)
    assert table["flagged"].tolist() == [False, True]


def test_what_shares_nothing():
    table = against(["", "甲", "天地"], "地", "")
    assert table["length"].tolist() == [0, 0, 1]
    assert (table["generated"][0], table["source"][0], table["title"][0]) == ("", "", "")
    assert len(against([], "地")) == 0
    assert against(["甲"])["length"].tolist() == [0]


def test_passages_of_a_long_document():
    rng = np.random.default_rng(0)
    long = "".join(map(chr, rng.integers(0x4E00, 0x9FA0, 50_000)))
    texts = [long[start : start + 300] for start in (0, 16_234, 49_700)]
    table = against(texts, long)
    assert table["length"].tolist() == [300] * 3
    assert [run(row, "source") for row in table.to_dict("records")] == texts


def test_a_line_of_stars_is_no_trap():
    row = against(["＊" * 200], "＊" * 100_000).iloc[0]  # 19 million pairs of equal runs of 8
    assert row["length"] == 200


def test_passages_are_shown_longest_first():
    text = "我道：" + PHRASE[4:16] + "。他道：好。"
    table = longest_runs(against(["没有", PHRASE[:5], text, "丙"], PHRASE), count=2)
    assert table["text"].tolist() == [2, 1]
    assert table["length"].tolist() == [12, 5]
    assert table["generated"][0] == f"我道：【{PHRASE[4:16]}】。他道：好。"
    assert table["source"][0] == f"{PHRASE[:4]}【{PHRASE[4:16]}】{PHRASE[16:]}"
    assert table["title"].tolist() == ["书 · 1"] * 2
    assert longest_runs(against(["没有"], "地")).empty


@functools.cache
def chapters(folder, name):
    file = corpus.File(folder / "wuxia" / f"{name}.txt", "wuxia", name, name)
    return [(d.chapter, d.text) for d in corpus.read_documents(corpus.FileReport(file))]


def chunks(documents):
    return [text[n : n + 200] for _, text in documents for n in range(0, len(text) - 199, 200)]


@pytest.mark.slow
def test_human_text_shares_little_with_other_novels(novels):
    texts = chunks(chapters(novels, "绿牡丹"))
    training = [d for n in ("三侠五义", "七剑十三侠", "续小五义") for d in chapters(novels, n)]
    table = overlap(texts, lambda: training)
    assert len(texts) > 900
    assert table["length"].median() == 7
    assert table["length"].quantile(0.95) <= 11
    assert not table["flagged"].any()
    squeezed = ["".join(text.split()) for _, text in training]
    for number in (0, 300, 600):
        text, length = "".join(texts[number].split()), table["length"][number]
        longer = {text[n : n + length + 1] for n in range(len(text) - length)}
        assert any(run(table.loc[number], "source") in there for there in squeezed)
        assert not any(run in there for there in squeezed for run in longer)


def test_two_chapters_share_what_difflib_finds(novels):
    one, other = (chapters(novels, "三侠五义")[n][1] for n in (3, 40))
    one, other = ("".join(text.split())[:3000] for text in (one, other))
    match = SequenceMatcher(None, one, other, autojunk=False).find_longest_match()
    assert against([one], other)["length"].tolist() == [match.size]


def test_a_copied_chapter_is_known_whole(novels):
    book = chapters(novels, "三侠五义")
    texts = chunks(book[:3])
    table = overlap(texts, lambda: book)
    assert table["flagged"].all()
    assert table["title"].isin([title for title, _ in book[:3]]).all()
