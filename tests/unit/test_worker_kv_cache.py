"""Pages move between device, host and file bit for bit, and nothing else changes."""

from __future__ import annotations

import gc
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lightning_rl.errors import ServerError
from rollout_server.kernels.interface import LayerCache
from rollout_server.worker.kv_cache import KVCache

PAGES, HOST = 9, 6
DEVICE = st.integers(0, PAGES - 1)
ON_HOST = st.integers(0, HOST - 1)


def uneven(pages: int) -> list[LayerCache]:
    """Layers whose keys and values are laid out differently, as a backend may, of random bits (NaNs among them)."""
    shapes = [((2, 4, 16), (2, 16, 4)), ((3, 5), (7,))]
    generator = torch.Generator().manual_seed(0)

    def bits(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(-(2**15), 2**15, (pages, *shape), dtype=torch.int16, generator=generator)

    return [LayerCache(bits(keys).view(torch.bfloat16), bits(values).view(torch.float16)) for keys, values in shapes]


def image(cache: KVCache) -> list[bytes]:
    """Each page's bytes over all layers."""
    return [
        b"".join(
            t[page].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for layer in cache.layers for t in layer
        )
        for page in range(PAGES + 1)
    ]


moves = st.lists(
    st.one_of(
        st.tuples(st.just("offload"), st.dictionaries(ON_HOST, DEVICE, max_size=5)),
        st.tuples(st.just("restore"), st.dictionaries(DEVICE, ON_HOST, max_size=5)),
        st.tuples(st.just("copy"), st.dictionaries(DEVICE, DEVICE, max_size=5)),
    ),
    max_size=6,
)


@pytest.mark.parametrize("on_disk", [False, True])
def test_moves_are_exact(on_disk: bool, tmp_path: Path) -> None:
    @settings(deadline=None, max_examples=60)
    @given(moves=moves)
    def check(moves: list[tuple[str, dict[int, int]]]) -> None:
        cache = KVCache(uneven, PAGES, host_pages=HOST, host_dir=tmp_path if on_disk else None)
        device, host = image(cache), [b""] * HOST
        cache.offload([(0, page) for page in range(HOST)])
        host = [device[0]] * HOST
        for kind, to_from in moves:
            pairs = [(source, target) for target, source in to_from.items()]
            getattr(cache, kind)(pairs)
            before = (list(device), list(host))
            for source, target in pairs:
                if kind == "offload":
                    host[target] = before[0][source]
                elif kind == "restore":
                    device[target] = before[1][source]
                else:
                    device[target] = before[0][source]
            assert image(cache) == device
        assert [page.numpy().tobytes() for page in cache.host] == host

    check()


def test_many_pages_in_one_pass() -> None:
    """More than pass through the staging memory together."""
    cache = KVCache(
        lambda pages: [LayerCache(torch.arange(pages * 3.0).view(pages, 3), torch.rand(pages, 2))], 200, host_pages=200
    )
    keys, values = (part.clone() for part in cache.layers[0])
    cache.offload([(page, 199 - page) for page in range(200)])
    for part in cache.layers[0]:
        part.zero_()
    cache.restore([(199 - page, page) for page in range(200)])
    assert torch.equal(cache.layers[0].keys[:200], keys[:200])
    assert torch.equal(cache.layers[0].values[:200], values[:200])


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    place = tmp_path / "new" / "place"
    cache = KVCache(uneven, PAGES, host_pages=HOST, host_dir=place)
    assert list(place.iterdir()) == []
    assert tuple(cache.host.shape) == (HOST, cache.page_bytes)
    del cache
    gc.collect()
    with pytest.raises(ServerError, match="keys and values"):
        KVCache(uneven, PAGES, host_pages=2**40, host_dir=place)
    assert list(place.iterdir()) == []


def test_release_and_reclaim() -> None:
    cache = KVCache(lambda pages: [LayerCache(torch.zeros(pages, 3), torch.zeros(pages, 2))], 4, host_pages=2)
    cache.layers[0].keys[1] = 7
    cache.offload([(1, 0)])
    cache.release()
    assert cache.layers == []
    cache.reclaim()
    assert cache.layers[0].keys.count_nonzero() == 0
    cache.restore([(0, 2)])
    assert cache.layers[0].keys[2].tolist() == [7, 7, 7]
