"""What the words of a request look like, as numbers. Pure; O(characters), at most READ_CHARS of them.

Owns: the lexical features, their names and their order, which trained weights rely on (FEATURES_VERSION). Does not own:
weights (scorer.py). None of the numbers gives the text back: they are counts of kinds of words and characters, so that
they may stand in a log.
"""

from __future__ import annotations

import re
from math import log1p

FEATURES_VERSION = 1
READ_CHARS = 2000

_KINDS = {
    "math": """
        algebra angle angles area arithmetic average binary circle coefficient combination combinations cube decimal
        degree denominator derivative diagonal diameter digit digits distance divide divided divides divisible
        divisor divisors edge edges equal equals equation equations even expected expression factor factorial factors
        fraction fractions gcd geometry graph hypotenuse inequality integer integers integral interval lcm length
        logarithm matrix mean median modulo multiple multiplied multiply natural number numbers numerator odd percent
        percentage perimeter permutation permutations polygon polynomial polynomials positive power prime primes
        probability product proof quadratic quotient radius ratio rational real remainder root roots sequence set
        sets side sides simplify slope solutions square squares subset subtract sum term terms theorem total triangle
        triangles value values variable variables vector vertex vertices volume zero zeros
        """,
    "solve": """
        calculate check compute conclude count decide deduce derive determine diagnose disprove estimate evaluate
        expand factor factorise factorize figure fix identify infer maximise maximize minimise minimize optimise
        optimize predict prove rearrange refute simplify solve sort transform verify
        """,
    "logic": """
        all allowed always assume assuming at both cannot condition conditions consecutive consists constraint
        constraints contradiction distinct each either every exactly exists following given hence if implies
        impossible least let maximum minimum most must neither never nor once only optimal otherwise possible
        respectively rule rules satisfies satisfy satisfying shortest such suppose then therefore unless valid where
        """,
    "puzzle": """
        adjacent alphabet anagram arrange board card cards cell cells character characters cipher coin coins column
        columns cube decode decrypt dice encrypted false game goal grid hours initial inversion jug jugs jumbled
        knaves knight knights ladder letter letters liar liars lie maze minutes move moves palindrome path pattern
        piece pieces player premise premises puzzle puzzles queen reorder reverse robot rotate rotation rotations row
        rows sentence shift step steps sudoku swap tile tiles token tokens tower true truth wins word words
        """,
    "code": """
        algorithm api array arrays assert boolean bug bugs byte bytes class code compile complexity console crash
        dataframe debug def dict dictionary docstring element elements endpoint error exception float function
        functions implement import index input int java javascript json list lists loop method object output parameter
        pointer program pull python query recursion recursive refactor regex return returned returns runtime rust sql
        str string strings stack struct test tests traceback tuple type typescript
        """,
    "write": """
        article blog brochure caption copywriting cover dialogue draft edit email essay essays fiction haiku headline
        intro introduction lyrics memo memoir narrative newsletter novel obituary outline paragraph paragraphs
        paraphrase persuasive pitch plot poem poems poetry post proofread prose report resume rewrite rhyme scene
        screenplay script sermon slogan song songs sonnet speech stories story summarise summarize summary tagline
        thesis toast translate translation tweet write writing
        """,
    "explain": """
        about advice approaches background best between compare concept define definition describe differ effective
        examples explain good guide help history idea ideas important kind mean meaning overview recipe recommend
        recommendation recommendations recommended should strategies suggest suggestion suggestions teach tell tips
        understand useful ways
        """,
    "chat": """
        awesome bye chat cool dear do fine friend friends fun glad goodbye great guess haha hello hey hi hola how joke
        lol love morning nice night ok okay opinion sad sorry sure thank thanks think today tonight weekend welcome
        wow yeah yes yo you your yourself
        """,
    "person": "i i'd i'll i'm i've im me mine my myself our ours us we we're",
    "fact": """
        actor album born capital ceo champion city club country currently ever film first invented language largest
        last latest married minister most movie name named newest oldest president released richest singer song
        team tallest when which who whose winner won world year
        """,
}
_KIND_OF = {word: i for i, words in enumerate(_KINDS.values()) for word in words.split()}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_QUESTIONS = _words("what who when where why which whose whom how is are was were do does did can could")
_COMMANDS = _words(
    "calculate compute count decrypt determine evaluate find given how if in let prove simplify solve sort suppose"
    " there transform using"
)
_WRITE = _words(
    "write draft compose rewrite create generate prepare make polish revise expand translate summarise summarize edit"
)
_WRITINGS = _words(
    "abstract abstracts acknowledgment acknowledgement acknowledgements announcement article articles biography blog"
    " brief caption captions copy cover dialogue dialogues email emails essay essays letter letters lyrics memo message"
    " messages monologue novel novels outline paper papers paragraph paragraphs plan plans poem poems post posts"
    " proposal report reports response review reviews scene scenes script scripts section speech statement stories"
    " story summaries summary text thesis tweet tweets"
)
_WRITE_WITHIN_WORDS = 7
_QUANTITIES = (
    *(f"how {word} " for word in ("many", "much", "long", "far", "old", "often")),
    *(
        f"what is the {word}"
        for word in ("sum", "value", "number", "probability", "least", "smallest", "largest", "total")
    ),
)
_REASONS = (
    "step by step",
    "step-by-step",
    "prove ",
    "show that",
    "such that",
    "if and only if",
    "at least",
    "at most",
    "root cause",
    "edge case",
    "trade-off",
    "tradeoff",
    "for all",
    "for every",
    "for each",
    "what happens if",
    "worst case",
)

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_FORMULA = re.compile(r"[=<>≤≥≠^*+/−∑∫√π∈∀∃⋅×÷$\\]\s*[-\w(\[{]")
_WRITES_CHINESE = re.compile("[写撰][一份个篇出作]|撰写|写作|润色|文章|论文|报告|演讲|小说|故事|翻译|总结")
_DIGITS, _CAPITALS = b"0123456789", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# What ordinary sentences are made of says nothing, however much of it there is.
_NO_SYMBOLS = _DIGITS + _CAPITALS + _CAPITALS.lower() + b" \t\r\n.,;:!?'\"()"
_FEW_CHARS = 40  # added to a text's length, so that two signs in a greeting are not half of it
NAMES = (
    *(f"words_{kind}" for kind in _KINDS),
    "length",
    "words",
    "word_length",
    "digit_share",
    "symbol_share",
    "capital_share",
    "foreign_share",
    "formulas",
    "quantity",
    "reasons",
    "writes",
    "begins_with_question",
    "begins_with_command",
    "variety",
    "is_short",
)


def features(text: str) -> list[float]:
    """The features of the first READ_CHARS characters, in the order of NAMES; most lie between 0 and 1."""
    text = text[:READ_CHARS]
    lower = text.lower()
    words = _WORD.findall(lower)
    return [*_kinds(words), *_shape(text, words), *_turns(text, lower, words)]


def _kinds(words: list[str]) -> list[float]:
    """How much of the text each kind of word makes up: the root of its share, so that a few words count."""
    counts = [0] * len(_KINDS)
    kind_of = _KIND_OF.get
    for word in words:
        kind = kind_of(word)
        if kind is not None:
            counts[kind] += 1
    many = len(words) + 4.0
    return [min(1.0, (count / many) ** 0.5) for count in counts]


def _shape(text: str, words: list[str]) -> list[float]:
    """Length and characters."""
    size = len(text) + _FEW_CHARS
    plain = text.encode("ascii", "ignore")
    many = len(plain)
    return [
        log1p(len(text)) / 7.6,
        log1p(len(words)) / 6,
        min(1.0, sum(map(len, words)) / (len(words) or 1) / 10),
        (many - len(plain.translate(None, _DIGITS))) / size,
        len(plain.translate(None, _NO_SYMBOLS)) / size,
        (many - len(plain.translate(None, _CAPITALS))) / size,
        (len(text) - many) / size,
    ]


def _turns(text: str, lower: str, words: list[str]) -> list[float]:
    """Turns of phrase."""
    first = words[0] if words else ""
    return [
        log1p(len(_FORMULA.findall(text))) / 4,
        1.0 if any(phrase in lower for phrase in _QUANTITIES) else 0.0,
        log1p(sum(map(lower.count, _REASONS))) / 2,
        1.0 if _asks_for_writing(text, words) else 0.0,
        1.0 if first in _QUESTIONS else 0.0,
        1.0 if first in _COMMANDS else 0.0,
        len(set(words)) / (len(words) + 4),
        1.0 if len(words) <= 8 else 0.0,
    ]


def _asks_for_writing(text: str, words: list[str]) -> bool:
    """Whether something that is written is asked for, by a verb and a noun close behind it."""
    if not _WRITE.isdisjoint(words):
        for i, word in enumerate(words):
            if word in _WRITE and not _WRITINGS.isdisjoint(words[i + 1 : i + 1 + _WRITE_WITHIN_WORDS]):
                return True
    return not text.isascii() and _WRITES_CHINESE.search(text) is not None
