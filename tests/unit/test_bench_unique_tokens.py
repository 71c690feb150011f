"""The radix tree's unique tokens: the trie against a set of prefixes, and what decoding computed is not counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.bench.scenarios import Conversation, Scenario, Turn
from rollout_server.bench.transcript import Choice, Exchange, Transcript, requests
from rollout_server.bench.unique_tokens import Trie, new_tokens, unique_tokens

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12)


@given(SEQUENCES)
def test_the_trie_counts_new_prefixes(sequences: list[list[int]]) -> None:
    trie, known = Trie(), set[tuple[int, ...]]()
    for ids in sequences:
        prefixes = {tuple(ids[:length]) for length in range(1, len(ids) + 1)}
        assert trie.insert(ids) == len(prefixes - known)
        known |= prefixes


def _turns(draw: st.DrawFn) -> list[Turn]:
    small = st.lists(st.integers(0, 1), min_size=1, max_size=4)
    return [
        Turn(append=draw(small), max_tokens=draw(st.integers(1, 3)), n=draw(st.integers(1, 2)), adapter=adapter)
        for adapter in [draw(st.sampled_from(["", "a"]))]
        for _ in range(draw(st.integers(1, 3)))
    ]


@st.composite
def played(draw: st.DrawFn) -> tuple[Scenario, Transcript]:
    """Random conversations that overlap in time at random; turns of one follow each other."""
    talks = [Conversation(turns=_turns(draw)) for _ in range(draw(st.integers(1, 4)))]
    exchanges = []
    for number, talk in enumerate(talks):
        clock = 0
        for turn_number, turn in enumerate(talk.turns):
            submitted = clock + draw(st.integers(0, 5))
            clock = submitted + turn.max_tokens + draw(st.integers(0, 5))
            ids = st.lists(st.integers(0, 1), min_size=turn.max_tokens, max_size=turn.max_tokens)
            choices = [Choice(ids=draw(ids), arrivals=[float(clock)] * turn.max_tokens) for _ in range(turn.n)]
            exchanges.append(
                Exchange(conversation=number, turn=turn_number, submitted=float(submitted), choices=choices)
            )
    exchanges.sort(key=lambda e: (e.submitted, e.conversation, e.turn))
    scenario = Scenario(name="random", concurrency=len(talks), seed=0, conversations=talks)
    return scenario, Transcript(wall_s=1.0, exchanges=exchanges, prefill_tokens=None)


@given(played())
def test_unique_tokens_against_sets_of_prefixes(case: tuple[Scenario, Transcript]) -> None:
    scenario, transcript = case
    every = list(requests(scenario, transcript))
    computed: set[tuple[str, tuple[int, ...]]] = set()
    count = 0
    for request in every:
        for earlier in every:
            if earlier.exchange.ended <= request.exchange.submitted:
                for choice in earlier.exchange.choices:
                    computed |= _prefixes(earlier.turn.adapter, earlier.prompt + choice.ids[:-1])
        wanted = _prefixes(request.turn.adapter, request.prompt)
        count += len(wanted - computed)
        computed |= wanted
    assert unique_tokens(scenario, transcript) == count


def _prefixes(adapter: str, ids: list[int]) -> set[tuple[str, tuple[int, ...]]]:
    return {(adapter, tuple(ids[:length])) for length in range(1, len(ids) + 1)}


def test_by_hand() -> None:
    """A second turn computes the last sampled id, which was never fed, and what it appends."""
    talk = Conversation(turns=[Turn(append=[1, 2, 3], max_tokens=3), Turn(append=[7, 8], max_tokens=1)])
    other = Conversation(turns=[Turn(append=[1, 2, 9], max_tokens=1, n=2)])
    adapted = Conversation(turns=[Turn(append=[1, 2, 3], max_tokens=1, adapter="a")])
    scenario = Scenario(name="by hand", concurrency=3, seed=0, conversations=[talk, other, adapted])

    def said(conversation: int, turn: int, submitted: float, *answers: list[int]) -> Exchange:
        choices = [Choice(ids=ids, arrivals=[submitted + 1.0] * len(ids)) for ids in answers]
        return Exchange(conversation=conversation, turn=turn, submitted=submitted, choices=choices)

    transcript = Transcript(
        wall_s=9.0,
        exchanges=[said(0, 0, 0.0, [4, 5, 6]), said(1, 0, 0.5, [4], [5]), said(2, 0, 0.6, [4]), said(0, 1, 3.0, [0])],
        prefill_tokens=None,
    )
    assert [r.prompt for r in requests(scenario, transcript)][3] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(new_tokens(requests(scenario, transcript))) == [3, 1, 3, 3]
