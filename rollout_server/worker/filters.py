"""Top-k, top-p and min-p, exactly, without sorting the vocabulary.

What these filters keep is always the beginning of the ids in falling order of logits, equal logits in rising order of ids.
So the likeliest few are taken out first, and only rows that turn out to keep more are looked at again with more. Which
number settles a row depends on that row alone, and so do its results: other rows have no influence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

RUNGS = ((256, 64), (16, 1024), (4, 8192))
"""(b, c): look at the logits that are not below the c-th largest of the maxima of blocks of b, c of them at least, equal
ones all or none. Reading maxima of blocks of 256 is nearly free: 64 rows of 49,152 take 5 ms on one core, by topk 24 ms,
by sort 1 s. Beyond the last rung everything is sorted."""

Rungs = tuple[tuple[int, int], ...]


class Filter(NamedTuple):
    """Of n rows, all [n] on the logits' device."""

    temperature: torch.Tensor
    """fp64, above 0."""
    top_k: torch.Tensor
    """int64, 0 is off."""
    top_p: torch.Tensor
    """fp64, 1 is off. The id that crosses it stays."""
    min_p: torch.Tensor
    """fp64, 0 is off."""


class Kept(NamedTuple):
    """What n rows may draw: the first `counts` of `ids`, with their renormalised log-probs."""

    ids: torch.Tensor
    """int64 [n, K], likeliest first."""
    logprobs: torch.Tensor
    """fp64 [n, K], -inf beyond `counts`."""
    counts: torch.Tensor
    """int64 [n], at least 1."""


def keep(logits_nV: torch.Tensor, by: Filter, rungs: Rungs = RUNGS) -> list[tuple[torch.Tensor, Kept]]:
    """Groups of rows (indices int64) with what they keep: first top-k, of that top-p, of that min-p."""
    vocab = logits_nV.shape[1]
    whole = _mass_beside_top(logits_nV, by)
    pending = torch.arange(logits_nV.shape[0], device=logits_nV.device)
    groups: list[tuple[torch.Tensor, Kept]] = []
    for block, least in rungs:
        if vocab // block < least:
            continue
        candidates = _largest(logits_nV[pending], block, least)
        kept, settled = _keep_among(candidates, Filter(*(part[pending] for part in by)), whole[pending])
        groups.append((pending[settled], Kept(*(part[settled] for part in kept))))
        pending = pending[~settled]
        if not pending.numel():
            return groups
    candidates = _all(logits_nV[pending])
    return [*groups, (pending, _keep_among(candidates, Filter(*(part[pending] for part in by)), whole[pending])[0])]


def leading(logits_nV: torch.Tensor, count: int, rungs: Rungs = RUNGS) -> torch.Tensor:
    """Ids [n, count] of the largest logits, in falling order, equal ones in rising order of ids; 0 in place of those
    that are impossible."""
    rows = logits_nV.shape[0]
    ones = torch.ones(rows, dtype=torch.float64, device=logits_nV.device)
    by = Filter(ones, torch.full((rows,), count, device=logits_nV.device), ones, torch.zeros_like(ones))
    ids = torch.zeros(rows, count, dtype=torch.int64, device=logits_nV.device)
    for which, kept in keep(logits_nV, by, rungs):
        here = kept.ids[:, :count]
        ids[which, : here.shape[1]] = here
    return ids


class _Candidates(NamedTuple):
    values: torch.Tensor
    """[n, K], falling; -inf beyond a row's own."""
    ids: torch.Tensor
    counts: torch.Tensor
    """int64 [n]."""
    complete: torch.Tensor
    """bool [n]: no other id is possible at all."""


def _largest(logits_nV: torch.Tensor, block: int, least: int) -> _Candidates:
    """The logits of at least `least` blocks' maxima, whatever is equal to the last of them included."""
    rows, vocab = logits_nV.shape
    even = vocab - vocab % block
    maxima = logits_nV[:, :even].unflatten(1, (-1, block)).amax(-1)
    bound = maxima.topk(least).values[:, -1:]
    cells = torch.nonzero(((logits_nV >= bound) & (logits_nV > -torch.inf)).view(-1))[:, 0]
    which = cells // vocab
    counts = torch.bincount(which, minlength=rows)
    place = torch.arange(cells.numel(), device=cells.device) - (counts.cumsum(0) - counts)[which]
    width = max(int(counts.max()), 1)
    values = logits_nV.new_full((rows, width), -torch.inf)
    values[which, place] = logits_nV.view(-1)[cells]
    ids = torch.zeros(rows, width, dtype=torch.int64, device=cells.device)
    ids[which, place] = cells % vocab
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return _Candidates(values, ids.gather(1, order), counts, bound[:, 0] == -torch.inf)


def _all(logits_nV: torch.Tensor) -> _Candidates:
    rows, vocab = logits_nV.shape
    values, ids = logits_nV.sort(dim=-1, descending=True, stable=True)
    every = torch.full((rows,), vocab, device=ids.device)
    return _Candidates(values, ids, every, torch.ones_like(every, dtype=torch.bool))


def _mass_beside_top(logits_nV: torch.Tensor, by: Filter) -> torch.Tensor:
    """Sum over the vocabulary of exp((logit - largest) / temperature), fp64 [n], for rows whose top-p is of the whole
    vocabulary; 1 for others, which do not need it."""
    whole = torch.ones_like(by.temperature)
    rows = torch.nonzero((by.top_p < 1.0) & (by.top_k == 0))[:, 0]
    if rows.numel():
        scaled = logits_nV[rows] / by.temperature[rows, None].to(logits_nV.dtype)
        whole[rows] = torch.log_softmax(scaled, -1).amax(-1).double().neg().exp()
    return whole


def _keep_among(candidates: _Candidates, by: Filter, whole: torch.Tensor) -> tuple[Kept, torch.Tensor]:
    """What rows keep if their candidates are enough, and whether they are (bool [n])."""
    values, ids, available, complete = candidates
    width = ids.shape[1]
    relative = (values.double() - values[:, :1].double()) / by.temperature[:, None]
    cumulative = relative.exp().cumsum(-1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    limited = by.top_k > 0
    of_top_k = cumulative.gather(1, (by.top_k - 1).clamp(0, width - 1)[:, None])
    target = by.top_p[:, None] * torch.where(limited[:, None], of_top_k, whole[:, None])
    inside = relative > -torch.inf
    inside &= (torch.arange(width, device=ids.device) < by.top_k[:, None]) | ~limited[:, None]
    inside &= (before < target) | (by.top_p[:, None] >= 1.0)
    inside &= relative >= by.min_p.log()[:, None]
    inside[:, 0] = True
    counts = inside.sum(-1)
    of_kept = cumulative.gather(1, (counts - 1)[:, None])
    logprobs = torch.where(inside, relative - of_kept.log(), -torch.inf)
    reached = limited & (by.top_k <= available)
    cut = (counts < available) & ((by.top_p >= 1.0) | ~limited)
    return Kept(ids, logprobs, counts), complete | reached | cut
