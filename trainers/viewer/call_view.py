"""One call to look at: every token that it was sent and sampled, who wrote it, and what was recorded of it."""

from __future__ import annotations

import math
import sys
from array import array

from msgspec import Struct

from lightning_rl.episode import Call
from lightning_rl.errors import LightningError, ModelError
from lightning_rl.store.outlines import Outline, load_episode_of
from rollout_server.models.catalog import at_hand
from rollout_server.models.config import read_config
from trainers.viewer.episode_view import Nodes, outline_of, request_texts, shown_step, weights_of
from trainers.viewer.library import NotThere
from trainers.viewer.opened import OpenRun
from trainers.viewer.records import Alternative, CallView, ExpertColumns, PromptPart
from trainers.viewer.relations import prompt_parts
from trainers.viewer.texts import Cut, finite, short
from trainers.viewer.tokens import Vocabulary, model_of, no_texts, vocabulary_of


class NoExperts(LightningError):
    """Experts were asked for that were not recorded, or cannot be read."""


class _Routed(Struct, frozen=True):
    """Experts of a call: of each token that was recorded, layer by layer, the chosen ones."""

    ids: array[int]
    layers: int
    top_k: int
    start: int
    """The first token of prompt + sampled that was recorded."""

    def of_layer(self, layer: int) -> list[list[int]]:
        firsts = range(layer * self.top_k, len(self.ids), self.layers * self.top_k)
        return [self.ids[first : first + self.top_k].tolist() for first in firsts]


def call_view(run: OpenRun, call_id: str) -> CallView:
    """Raises NotThere, and StoreError where the store is damaged."""
    call, outline = _call(run, call_id)
    start, cut = outline.episode.start, Cut()
    in_order = sorted(outline.episode.calls, key=lambda one: (one.index, one.id))
    at = next(place for place, one in enumerate(in_order) if one.id == call_id)
    routed = _routed(run, call)
    vocabulary, why_not = vocabulary_of(run, call)
    columns = vocabulary.columns if vocabulary else no_texts
    return CallView(
        id=call.id,
        episode=start.id,
        group=start.group,
        phase=start.phase,
        step=shown_step(start.phase, start.step),
        node=Nodes(outline, weights_of(run), cut).of_call(call_id),
        before=in_order[at - 1].id if at else None,
        after=in_order[at + 1].id if at + 1 < len(in_order) else None,
        prompt=columns(call.prompt_ids),
        prompt_parts=[
            PromptPart(
                start=part.start,
                end=part.end,
                call=part.call.id if part.call else None,
                index=part.call.index if part.call else None,
            )
            for part in prompt_parts(outline, call)
        ],
        sampled=columns(call.sampled_ids),
        logprobs=list(map(finite, call.logprobs)),
        versions=call.versions,
        entropies=list(map(finite, call.entropies)),
        alternatives=_alternatives(call.alternatives, vocabulary),
        expert_layers=routed.layers if routed else 0,
        tokenizer=why_not,
        **request_texts(start.id, call, cut),
    )


def experts(run: OpenRun, call_id: str, layer: int) -> ExpertColumns:
    """`layer` counts the layers that have experts, from 0. Raises NotThere and NoExperts."""
    call = run.store.call(call_id)
    if call is None:
        raise _no_call(call_id)
    routed = _routed(run, call)
    if routed is None:
        raise NoExperts(
            "no experts were recorded for this call, or the shape of its model is not known",
            hint="they are known of mixtures of experts whose config.json is on this machine",
        )
    if not 0 <= layer < routed.layers:
        raise NoExperts(f"there is no layer {layer} with experts: there are {routed.layers}, from 0")
    return ExpertColumns(layer=layer, layers=routed.layers, start=routed.start, experts=routed.of_layer(layer))


def _call(run: OpenRun, call_id: str) -> tuple[Call, Outline]:
    call = run.store.call(call_id)
    episode_id = run.store.read(lambda connection: load_episode_of(connection, call_id))
    if call is None or episode_id is None:
        raise _no_call(call_id)
    outline = outline_of(run.store, episode_id)
    if call_id not in outline.tokens:
        raise _no_call(call_id)
    return call, outline


def _no_call(call_id: str) -> NotThere:
    return NotThere(f"there is no call {short(call_id)}", hint="its episode may be in another run")


def _alternatives(recorded: list[list[tuple[int, float]]], vocabulary: Vocabulary | None) -> list[list[Alternative]]:
    def text(id: int) -> str:
        return vocabulary.token(id).text if vocabulary else ""

    return [
        [Alternative(id=id, text=text(id), logprob=logprob) for id, logprob in token if math.isfinite(logprob)]
        for token in recorded
    ]


def _routed(run: OpenRun, call: Call) -> _Routed | None:
    """The bytes do not say their shape: it is the model's. The last sampled token never went through the model, and what was cached
    may be missing at the beginning, so that what is there ends where it ends."""
    if not call.experts:
        return None
    model = model_of(run, call)
    config = at_hand(model, "config.json") if model else None
    try:
        moe = read_config(config.parent).moe if config else None
    except ModelError:
        return None
    ids = array("h")
    if moe is None or len(call.experts) % (ids.itemsize * len(moe.layers) * moe.top_k):
        return None
    ids.frombytes(call.experts)
    if sys.byteorder == "big":
        ids.byteswap()
    tokens, total = len(ids) // (len(moe.layers) * moe.top_k), len(call.prompt_ids) + len(call.sampled_ids)
    if tokens > total:
        return None
    return _Routed(ids, len(moe.layers), moe.top_k, start=max(0, total - 1 - tokens))
