"""Pseudo-words for labels: no dictionary, no licence, no meaning. Lengths follow the released labels (spec sec. 4)."""

import random

_ONSETS = (
    *"bcdfghjlmnprstvwyz", *"bcdfghlmnprst", "qu", "bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "ph",
    "pl", "pr", "sc", "sh", "sl", "sm", "sn", "sp", "st", "str", "th", "tr",
)  # fmt: skip
_VOWELS = (*"aeiouaeioaeioaeioy", "ae", "ea", "ie", "oo", "ou", "io", "ia")
_CODAS = (*([""] * 4), *"bdlmnprstx", "ck", "ll", "nd", "ng", "nt", "rd", "rn", "st")
_ENDINGS = ("", "", "", "s", "ed", "ing", "ous", "ly", "ness", "ism", "able", "ic", "al", "ium", "ate", "ist", "ity")
# Relative frequency of word lengths 2..20 among the released labels' words: one hump at 8 to 9 letters.
_LENGTHS = (1, 3, 8, 14, 22, 30, 34, 34, 29, 23, 16, 10, 6, 4, 2, 1, 1, 1, 1)
LONGEST_LABEL = 20
_TRIES = 1000  # draws per label, after which a list of words is given up


def pseudo_word(rng: random.Random) -> str:
    """One lower-case word of 2 to 20 letters."""
    length = rng.choices(range(2, 21), weights=_LENGTHS)[0]
    ending = rng.choice(_ENDINGS)
    text = ""
    while len(text) + len(ending) < length:
        text += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    return (text + ending)[:length] if len(ending) < length else text[:length]


def word_label(rng: random.Random, words: list[str] | None = None) -> str:
    """One to five words, as many as fit into 20 characters; from `words` or made up."""
    label = ""
    for _ in range(rng.randint(1, 5)):
        word = rng.choice(words) if words else pseudo_word(rng)
        longer = f"{label} {word}".strip()
        if len(longer) > LONGEST_LABEL:
            break
        label = longer
    return label or (rng.choice(words)[:LONGEST_LABEL] if words else pseudo_word(rng))


def unique_word_labels(rng: random.Random, count: int, words: list[str] | None = None) -> list[str]:
    """`count` different labels.

    Raises:
        ValueError: The words hardly give that many.
    """
    labels: list[str] = []
    tries = 0
    while len(labels) < count:
        label, tries = word_label(rng, words), tries + 1
        if label not in labels:
            labels.append(label)
        elif tries > _TRIES * count:
            raise ValueError(
                f"{len(words or ())} words gave {len(labels)} different labels of up to {LONGEST_LABEL} characters, "
                f"wanted {count}; give more words, or charts of fewer nodes"
            )
    return labels


def letter_labels(rng: random.Random, count: int) -> list[str]:
    """`count` different capital letters, at most 26."""
    return rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", count)
