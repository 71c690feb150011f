import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.token_tree import Relation, TokenTree, TreeSize, build_tree, common_prefix, label_calls
from tests.unit.domain import make_call

short_ids = st.lists(st.integers(0, 2), max_size=6)
call_lists = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), short_ids), max_size=8).map(
    lambda pairs: [make_call(prompt, sampled, id=f"c{i}") for i, (prompt, sampled) in enumerate(pairs)]
)


def path_of(tree: TokenTree, call_id: str) -> list[int]:
    """The nodes of the call's tokens, prompt first."""
    path, node = [], tree.last_nodes[call_id]
    while node >= 0:
        path.append(node)
        node = tree.parents[node]
    return path[::-1]


@given(call_lists)
def test_paths_reproduce_the_ids(calls):
    tree = build_tree(calls)
    for call in calls:
        path = path_of(tree, call.id)
        assert [tree.ids[node] for node in path] == call.prompt_ids + call.sampled_ids
        assert [tree.depths[node] for node in path] == list(range(len(path)))
        assert tree.terms(call.id) == [
            (path[len(call.prompt_ids) + i - 1], token) for i, token in enumerate(call.sampled_ids)
        ]


@given(call_lists)
def test_every_distinct_prefix_has_one_node(calls):
    sequences = [call.prompt_ids + call.sampled_ids for call in calls]
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert len(build_tree(calls).ids) == len(prefixes)


@given(call_lists)
def test_interval_test_is_ancestry(calls):
    tree = build_tree(calls)
    for q in range(len(tree.ids)):
        ancestors = {q}
        node = q
        while (node := tree.parents[node]) >= 0:
            ancestors.add(node)
        assert {k for k in range(len(tree.ids)) if k <= q < tree.ends[k]} == ancestors
        assert tree.depths[q] == len(ancestors) - 1


@given(call_lists, st.randoms())
def test_the_order_of_the_calls_does_not_matter(calls, random):
    shuffled = random.sample(calls, len(calls))
    assert build_tree(shuffled) == build_tree(calls)


@given(call_lists, st.integers(1, 8))
def test_a_limit_cuts_sequences(calls, limit):
    tree = build_tree(calls, max_tokens=limit)
    for call in calls:
        sequence = call.prompt_ids + call.sampled_ids
        assert [tree.ids[node] for node in path_of(tree, call.id)] == sequence[:limit]
        kept = max(0, min(len(call.sampled_ids), limit - len(call.prompt_ids)))
        assert [target for _, target in tree.terms(call.id)] == call.sampled_ids[:kept]


@given(call_lists, st.integers(1, 8))
def test_the_size_of_a_tree_is_known_without_it(calls, limit):
    size = TreeSize()
    for count, call in enumerate(calls, 1):
        size = size.with_sequences([(call.prompt_ids + call.sampled_ids)[:limit]])
        assert size.nodes == len(build_tree(calls[:count], max_tokens=limit).ids)


@given(short_ids, short_ids)
def test_common_prefix(one, other):
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    assert common_prefix(one, other) == length


def test_a_first_token_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="c has no prompt"):
        build_tree([make_call([], [1])])


def labels(*pairs):
    found = label_calls([make_call(prompt, sampled, id=f"c{i}") for i, (prompt, sampled) in enumerate(pairs)])
    return [(label.relation, label.parted_at, label.previous_id) for label in found.values()]


FIRST = ([1, 2, 3], [10, 11])
ROOT = (Relation.ROOT, 0, None)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 2, 3, 10, 11, 4], (Relation.EXTENSION, 5, "c0")),
        ([1, 2, 3, 10, 11], (Relation.EXTENSION, 5, "c0")),
        ([1, 2, 3], (Relation.FORK, 3, "c0")),
        ([1, 2, 3, 10, 12, 4], (Relation.EDIT, 4, "c0")),
        ([1, 2, 3, 12], (Relation.EDIT, 3, "c0")),
        ([1, 2, 3, 10], (Relation.EDIT, 4, "c0")),
        ([1, 2, 7, 8], (Relation.ROOT, 2, "c0")),
        ([1, 2], (Relation.ROOT, 2, "c0")),
        ([9, 9], ROOT),
    ],
)
def test_labels_after_one_call(prompt, expected):
    assert labels(FIRST, (prompt, [20])) == [ROOT, expected]


SECOND = ([1, 2, 3, 10, 11, 4, 5], [20, 21])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, 2, 3, 10, 11, 4, 5, 20, 21, 6], (Relation.EXTENSION, 9, "c1")),
        ([1, 2, 3, 10, 11, 4, 6], (Relation.FORK, 6, "c0")),  # another tool result in parallel
        ([1, 2, 3, 10, 11, 7], (Relation.FORK, 5, "c0")),
        ([1, 2, 3, 10, 11, 4, 5, 20, 22, 6], (Relation.EDIT, 8, "c1")),
        ([1, 2, 3, 10, 11, 4, 5], (Relation.FORK, 7, "c1")),
        ([1, 2, 3, 12, 4], (Relation.EDIT, 3, "c0")),
    ],
)
def test_labels_after_two_calls(prompt, expected):
    assert labels(FIRST, SECOND, (prompt, [30]))[2] == expected


def test_a_call_that_sampled_nothing_is_passed_over():
    assert labels(([1, 2], []), ([1, 2], [3])) == [ROOT, ROOT]


@given(call_lists)
def test_labels_agree_with_the_tokens(calls):
    """Where a call is said to part, it does: everything before was there, and what follows was not."""
    by_id = {call.id: call for call in calls}
    earlier = []
    for call_id, label in label_calls(calls).items():
        call = by_id[call_id]
        shared = [common_prefix(call.prompt_ids, other.prompt_ids + other.sampled_ids) for other in earlier]
        assert label.parted_at == max(shared, default=0)
        if label.relation is Relation.EXTENSION:
            previous = by_id[label.previous_id]
            assert call.prompt_ids[: label.parted_at] == previous.prompt_ids + previous.sampled_ids
        if call.sampled_ids:
            earlier.append(call)
