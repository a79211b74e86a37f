"""Clean a text by rules, one after the other, and count what each did.

Characters in = characters out + removed - inserted, for every rule and for all of them together.
Quotation marks, full-width punctuation and paragraph breaks stay as the author has them.
"""

from collections.abc import Container
from dataclasses import dataclass, field

from wuxia_core.corpus import rules, sites

RULES = {
    rule.__name__: rule
    for rule in (
        *(rules.line_ends, sites.page_marks, rules.markup, rules.invisible, rules.mojibake),
        *(rules.garbled, sites.stamps, sites.notices, sites.furniture, sites.headings),
        *(sites.contents, sites.hard_wrap, rules.spaces, rules.private_use, rules.blank_lines),
    )
}
NOVELS_ONLY = frozenset(name for name, rule in RULES.items() if rule.__module__ == sites.__name__)

EXAMPLES, AROUND = 5, 12  # examples kept for a rule and text; characters shown around each


@dataclass
class Tally:
    """What a rule did to a text, in characters."""

    rule: str
    count: int = 0
    removed: int = 0
    inserted: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)  # before and after

    def add(self, other: "Tally") -> None:
        """Count what the rule did to another text too."""
        self.count += other.count
        self.removed += other.removed
        self.inserted += other.inserted
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


def clean(text: str, skip: Container[str] = ()) -> tuple[str, list[Tally]]:
    r"""Apply every rule but those in `skip`; list the ones that did something.

    `"　　甲。\r\n\r\n　　乙。"` becomes `"甲。\n乙。"`: two line ends, two indents, an empty line.
    """
    tallies = []
    for name in RULES:
        if name not in skip:
            text, tally = _apply(name, text)
            tallies += [tally] if tally.count else []
    return text, tallies


def _apply(name: str, text: str) -> tuple[str, Tally]:
    tally = Tally(name)
    pieces, done = [], 0
    for start, end, new in RULES[name](text):
        pieces += [text[done:start], new]
        tally.count += 1
        tally.removed += end - start
        tally.inserted += len(new)
        if len(tally.examples) < EXAMPLES:
            before, after = text[max(0, start - AROUND) : start], text[end : end + AROUND]
            tally.examples.append((before + text[start:end] + after, before + new + after))
        done = end
    pieces.append(text[done:])
    return "".join(pieces), tally
