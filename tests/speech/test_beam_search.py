"""The beam search alone: what goes on, what is finished, when it ends."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lora_speech.decoding.beam_search import BeamSearch

END = 0


def run(search: BeamSearch, table: dict[tuple[int, ...], list[float]], asked: int) -> None:
    """Search a model that is a table: log-probabilities of all tokens after each sequence."""
    while not search.done:
        values, tokens = [], []
        for sequence in search.tokens:
            row = table[tuple(sequence)]
            best = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:asked]
            values.append([row[token] for token in best])
            tokens.append(best)
        parents = search.advance(values, tokens)
        assert len(parents) == len(search.tokens) == search.beams


def random_table(seed: int, words: int, length: int) -> dict[tuple[int, ...], list[float]]:
    """Log-probabilities after every sequence of up to `length` tokens without an end."""
    draw = random.Random(seed)
    table = {}
    for size in range(length):
        for sequence in itertools.product(range(1, words), repeat=size):
            weights = [draw.random() ** 3 + 1e-3 for _ in range(words)]
            table[sequence] = [math.log(weight / sum(weights)) for weight in weights]
    return table


def total(table: dict[tuple[int, ...], list[float]], sequence: tuple[int, ...]) -> float:
    return sum(table[sequence[:i]][token] for i, token in enumerate(sequence))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all(seed: int, penalty: float) -> None:
    words, limit = 4, 4
    table = random_table(seed, words, limit)
    search = BeamSearch(beams=200, end=END, limit=limit, length_penalty=penalty)
    run(search, table, asked=words)
    full = [(*s, END) for n in range(limit) for s in itertools.product(range(1, words), repeat=n)]
    full += list(itertools.product(range(1, words), repeat=limit))
    scored = {s: total(table, s) / len(s) ** penalty for s in full}
    best = max(scored, key=scored.__getitem__)
    assert search.best.tokens == [token for token in best if token != END]
    assert search.best.score == pytest.approx(scored[best])


def test_one_beam_is_greedy() -> None:
    table = random_table(7, 5, 6)
    search = BeamSearch(beams=1, end=END, limit=6)
    run(search, table, asked=3)
    expected: list[int] = []
    while len(expected) < 6:
        row = table[tuple(expected)]
        token = row.index(max(row))
        if token == END:
            break
        expected.append(token)
    assert search.best.tokens == expected


def test_parents_and_order() -> None:
    search = BeamSearch(beams=2, end=END, limit=9)
    assert search.advance([[-1.0, -2.0, -3.0, -4.0]], [[5, 6, 7, 8]]) == [0, 0]
    assert (search.tokens, search.scores) == ([[5], [6]], [-1.0, -2.0])
    parents = search.advance(
        [[-3.0, -4.0, -9.0, -9.0], [-0.5, -1.0, -9.0, -9.0]], [[1, 2, 3, 4]] * 2
    )
    assert parents == [1, 1]
    assert (search.tokens, search.scores) == ([[6, 1], [6, 2]], [-2.5, -3.0])
    # Of equals, the likelier parent's comes first.
    assert search.advance(
        [[-1.0, -9.0, -9.0, -9.0], [-0.5, -9.0, -9.0, -9.0]], [[1, 2, 3, 4]] * 2
    ) == [
        0,
        1,
    ]


def test_an_end_below_the_first_beams_does_not_count() -> None:
    search = BeamSearch(beams=2, end=END, limit=9)
    search.advance([[-1.0, -2.0, -3.0, -4.0]], [[5, 6, END, 7]])
    assert search.finished == []
    search.advance([[-1.0, -1.5, -9.0, -9.0], [-9.0] * 4], [[END, 6, 7, 8]] * 2)
    assert [(h.tokens, h.score) for h in search.finished] == [([5], -1.0)]
    assert search.tokens == [[5, 6], [5, 7]]


def test_it_ends_when_no_running_hypothesis_can_win() -> None:
    search = BeamSearch(beams=1, end=END, limit=9, length_penalty=0.0)
    search.advance([[-1.0, -3.0]], [[END, 5]])
    assert search.done
    search = BeamSearch(beams=2, end=END, limit=9, length_penalty=0.0)
    search.advance([[-0.1, -3.0, -4.0, -5.0]], [[5, END, 6, 7]])
    assert not search.done
    assert len(search.finished) == 1
    search.advance([[-1.0, -4.0, -5.0, -5.0], [-2.0] * 4], [[END, 6, 7, 8], [5, 6, 7, 8]])
    assert [h.score for h in search.finished] == [-1.1, -3.0]
    assert search.done


def test_length_penalty_chooses_between_short_and_long() -> None:
    def best(penalty: float) -> list[int]:
        search = BeamSearch(beams=2, end=END, limit=3, length_penalty=penalty)
        search.advance([[-1.0, -1.1, -9.0, -9.0]], [[END, 5, 6, 7]])
        while not search.done:
            search.advance([[-0.3, -9.0, -9.0, -9.0]] * 2, [[5, END, 6, 7]] * 2)
        return search.best.tokens

    assert best(0.0) == []
    assert best(1.0) == [5, 5, 5]


def test_without_candidates_for_all_beams_the_rest_have_no_chance() -> None:
    search = BeamSearch(beams=3, end=END, limit=4)
    none = -math.inf
    assert search.advance([[-1.0, none, none, none, none, none]], [[5, 1, 2, 3, 4, 6]]) == [0] * 3
    assert search.scores == [-1.0, none, none]
    rows = [[-1.0, -2.0, none, none, none, none]] * 3
    assert search.advance(rows, [[5, END, 2, 3, 4, 6]] * 3) == [0] * 3
    assert [h.tokens for h in search.finished] == [[5]]
    search.advance([[none] * 6] * 3, [[1, 2, 3, 4, 5, 6]] * 3)
    assert search.done
    assert search.best.tokens == [5]
    nothing = BeamSearch(beams=1, end=END, limit=4)
    assert nothing.advance([[none, none]], [[1, 2]]) == [0]
    assert nothing.done
    assert nothing.best.tokens == []
