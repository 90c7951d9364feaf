"""Which texts say the same: groups of near-duplicates, found exactly, not by sampling.

Texts are near-duplicates when their words (for Chinese and Japanese: pairs of characters) agree to `NEAR` in
weighted Jaccard similarity, a word counting log(texts / texts that have it): a template that all prompts share
counts for nothing. Groups are the closure of that. Pairs are found by prefix filtering (Chaudhuri et al. 2006, "A
Primitive Operator for Similarity Joins"; Bayardo et al. 2007, "Scaling Up All Pairs Similarity Search"): sort each
text's words from rare to common and cut off the tail that weighs less than `NEAR` of all; near-duplicates then
share a word before the cut.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from onebase_training.data.words import compared_words

NEAR = 0.8

_ROUNDING = 1e-9
"""The filters may let a little more through than they must; the similarity itself decides."""


def groups(texts: Sequence[str]) -> list[int]:
    """For each text the number of its group; a group's number is the place of its first text."""
    words = [tuple(compared_words(text)) for text in texts]
    unique = list(dict.fromkeys(words))
    parent = _join_near(unique)
    first_of: dict[int, int] = {}
    place_of = {key: place for place, key in enumerate(unique)}
    return [first_of.setdefault(_root(parent, place_of[key]), at) for at, key in enumerate(words)]


def _join_near(texts: Sequence[tuple[str, ...]]) -> list[int]:
    """Union-find parents of `texts`, which are all different."""
    sets = [frozenset(text) for text in texts]
    count = Counter(word for members in sets for word in members)
    weight = {word: math.log(len(sets) / times) for word, times in count.items()}
    # fsum, because a set's order, and with it a plain sum's last digit, changes from run to run.
    totals = [math.fsum(weight[word] for word in members) for members in sets]
    parent = list(range(len(sets)))
    seen: defaultdict[str, list[int]] = defaultdict(list)
    for place, members in enumerate(sets):
        prefix = _prefix(members, weight, totals[place])
        least, most = NEAR * totals[place] * (1 - _ROUNDING), totals[place] / NEAR * (1 + _ROUNDING)
        for other in {at for word in prefix for at in seen[word] if least <= totals[at] <= most}:
            mine, theirs = _root(parent, place), _root(parent, other)
            if mine != theirs and _similarity(members, sets[other], weight) >= NEAR:
                parent[mine] = theirs
        for word in prefix:
            seen[word].append(place)
    return parent


def _prefix(members: frozenset[str], weight: dict[str, float], total: float) -> list[str]:
    prefix: list[str] = []
    rest = total
    for word in sorted(members, key=lambda word: (-weight[word], word)):
        if rest < NEAR * total * (1 - _ROUNDING):
            break
        prefix.append(word)
        rest -= weight[word]
    return prefix


def _similarity(one: frozenset[str], other: frozenset[str], weight: dict[str, float]) -> float:
    both = math.fsum(weight[word] for word in one & other)
    either = math.fsum(weight[word] for word in one | other)
    return both / either if either else float(one == other)


def _root(parent: list[int], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place
