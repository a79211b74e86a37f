"""Ask for no names of the books' people: do they leak less, and does style strength hold.

    python -m torch.distributed.run --standalone benchmarks/skip_names.py FOLDER CONDITION [--skip]

Trains a condition of `objectives.py` (masked, clm) with seed 0 and 10 % general text, with --skip
without masks and labels on names, and prints one line: names, style and bits per character of 512
passages that go on from 绿牡丹, and of the base. Names are words of the three books that rjieba
takes for people, begin with a surname, are there 20 times and ten times rarer in general text.
"""

import argparse
import functools
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import objectives as shared
import rjieba

from wuxia_core import mix
from wuxia_core.evaluate import writing
from wuxia_core.evaluate.context import EvalContext
from wuxia_core.evaluate.copying import overlap
from wuxia_core.evaluate.scoring import document_bits
from wuxia_core.masking import MaskCollator, padded
from wuxia_core.model import load_adapter, load_tokenizer, write_adapter

SURNAMES = set(
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜戚谢邹喻柏水窦章云苏潘葛奚范彭郎鲁韦昌马苗凤花方俞任袁柳"
    "酆鲍史唐费廉岑薛雷贺倪汤滕殷罗毕郝邬安常乐于时傅皮卞齐康伍余元卜顾孟平黄和穆萧尹姚邵湛汪祁毛禹狄米贝明臧计伏成戴谈宋茅庞"
    "熊纪舒屈项祝董梁杜阮蓝闵席季麻强贾路娄危江童颜郭梅盛林刁钟徐邱骆高夏蔡田樊胡凌霍虞万支柯管卢莫房裘解应宗丁宣邓洪包诸左石"
    "崔吉龚程邢陆翁荀封储段焦谷车侯全班秋仲伊宫宁仇厉祖武符刘景詹束龙叶司黎白从赖卓蔺屠蒙池乔闻翟谭劳姬申冉雍桑桂牛寿通边燕冀"
    "尚农温庄晏柴瞿阎充慕茹习艾鱼容向古易廖耿匡国文寇广欧殳师巩晁勾敖那简饶空曾沙乜养鞠丰关相查荆红游权益桓公展智北南"
)


def names() -> list[str]:
    """List the names, the longest first."""
    novels = [(shared.CORPUS / "wuxia" / f"{name}.txt").read_text() for name in shared.NOVELS]
    general = "".join(path.read_text() for path in (shared.CORPUS / "general").glob("*.txt"))
    tags: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text in novels:
        for word, tag in rjieba.tag(text, True):
            tags[word][tag] += 1
    size, found = sum(map(len, novels)), []
    for word, tagged in tags.items():
        n, person = tagged.total(), re.fullmatch("[一-鿿]{2,4}", word) and word[0] in SURNAMES
        if person and n >= 20 and tagged["nr"] * 2 >= n and word[-1] not in "道说":
            found += [word] * (general.count(word) * 10 * size < n * len(general))
    return sorted(found, key=len, reverse=True)


def skip(pattern: "re.Pattern[str]", tokenizer: object) -> None:
    """Take what belongs to a name from what may be masked or labelled."""
    maskable = MaskCollator._maskable

    @functools.lru_cache(100_000)
    def in_names(ids: tuple[int, ...]) -> np.ndarray:
        ends = np.cumsum([len(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))])
        starts, marked = np.concatenate([[0], ends[:-1]]), np.zeros(len(ids), bool)
        for match in pattern.finditer(tokenizer.decode(ids)):
            marked[(starts < match.end()) & (ends > match.start())] = True
        return marked

    def without_names(self: MaskCollator, windows: list) -> np.ndarray:
        rows = [in_names(tuple(window.input_ids.tolist())) for window in windows]
        return maskable(self, windows) & ~padded(rows, 0).astype(bool)

    MaskCollator._maskable = without_names


def main() -> None:
    """Train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("condition", choices=shared.CONDITIONS)
    parser.add_argument("--skip", action="store_true")
    options = parser.parse_args()
    folder, found = options.folder, names()
    pattern = re.compile("|".join(found))
    shared.gather_texts(folder)
    config = shared.settings(
        folder, *shared.CONDITIONS[options.condition], "data.general_ratio=0.1", "training.seed=0",
        f"data.processed_data_file={folder / 'mixtures' / 'ratio_0.1'}",
    )  # fmt: skip
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    if options.skip:
        skip(pattern, tokenizer)
    mixture, place = mix(config), folder / "runs" / f"{options.condition}, skip {options.skip}"
    trainer = shared.new_trainer(config, mixture, place, [])
    trainer.train()
    write_adapter(trainer.model, place)

    context = EvalContext(*load_adapter(place), mixture, config)
    held_out = mix(shared.settings(folder, "data.general_ratio=0.2", held_out=True)).documents
    chapters = held_out[held_out["source"] == "wuxia"]["text"]
    prompts = [text[40 * n : 40 * n + 40] for n in range(8) for text in chapters][:512]
    openings, people = shared.passages(folder), writing._People(context)

    def measure() -> dict[str, float]:
        parts = range(0, len(prompts), 16)
        written = [writing.generate(context, prompts[n : n + 16], n, 150) for n in parts]
        texts = [re.sub(r"\s", "", text)[:150] for chunk in written for text in chunk]
        bits = document_bits(context.model, tokenizer, openings["text"], shared.WINDOW)
        bits = bits.groupby(openings["source"]).sum()
        return {
            "passages with a name": float(np.mean([bool(pattern.search(x)) for x in texts])),
            "style": float(np.mean(people.classifier.decision_function(texts))),
            "copied": float(np.mean(overlap(texts, mixture.training_texts)["length"])),
            **(bits["bits"] / bits["chars"]).to_dict(),
        }

    base, tuned = context.base_and_tuned(measure)
    print(len(found), options.condition, options.skip, {"base": base, "tuned": tuned})


if __name__ == "__main__":
    main()
