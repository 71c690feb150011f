"""How a request enters its episode: as a new one, or as one that was answered before and only gets the answer again.

A request that repeats one still under way waits for its end. Whatever becomes of a new one is told to those that repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from rollout_server.api.exchange import Asked, unless_gone
from rollout_server.api.front.visit import visit
from rollout_server.api.recorder import EpisodeLog
from rollout_server.api.retries import (
    Answered,
    Asker,
    Naming,
    Sending,
    answered,
    asker_of,
    fingerprint,
    key_digits,
    new_exchange_id,
)
from rollout_server.api.services import Services
from rollout_server.api.turn import SamplingOptions


def prefixed(prefix: str) -> Naming:
    """One id for all choices: that of the exchange behind `prefix`."""
    return lambda exchange_id, _: prefix + exchange_id


async def ask(
    services: Services,
    http: Request,
    episode_id: str | None,
    body: Mapping[str, Any],
    naming: Naming,
    sampling: SamplingOptions,
    prompts: int = 1,
) -> Asked:
    """`prompts` have `sampling.n` choices each. Raises ApiError 404 for an unknown episode, ClientGone."""
    log, asker = await services.episode(episode_id), asker_of(http)
    exchange_id = new_exchange_id(asker.key)
    if log is None:
        return Asked(exchange_id, naming)
    print_ = fingerprint(naming, await http.body(), asker)
    if asker.may_repeat:
        sending = await _begun_again(http, log, print_, exchange_id, asker)
        replay = await _replay(services, log, sending, body, naming, sampling, prompts, asker)
    else:
        sending, replay = log.sendings.begin(print_, exchange_id, asker.attempt), None

    def left() -> None:
        if not sending.conducted:
            sending.end(whole=False)

    visit(http).at_end.callback(left)
    return Asked(sending.exchange_id, naming, log, sending, replay)


async def _begun_again(http: Request, log: EpisodeLog, print_: bytes, exchange_id: str, asker: Asker) -> Sending:
    """Once what it repeats is over. Raises ClientGone."""
    attempt = asker.attempt if asker.key is None else None
    while (sending := log.sendings.begin_again(print_, exchange_id, attempt)) is None:
        await unless_gone(http, log.sendings.an_end())
    return sending


async def _replay(
    services: Services,
    log: EpisodeLog,
    sending: Sending,
    body: Mapping[str, Any],
    naming: Naming,
    sampling: SamplingOptions,
    prompts: int,
    asker: Asker,
) -> Answered | None:
    """What the request that this one repeats was answered; if this process does not know it, the store may. It is over then, with
    the same answer."""
    repeats = sending.repeats
    if not (log.sendings.has_past if repeats is None else repeats.whole):
        return None
    assert services.recorder is not None  # there is no log without one
    try:
        if repeats is not None:
            calls = await services.recorder.calls(log.id, f"{repeats.exchange_id}-")
        else:
            calls = await services.recorder.calls(log.id, "" if asker.key is None else key_digits(asker.key))
            calls = [call for call in calls if asker.may_have_made(call, body)]
    except BaseException:  # a store that fails must not cost the answer
        log.sendings.withdraw(sending)
        raise
    found = answered(calls, naming, sampling.n * prompts, alternatives=sampling.top_logprobs > 0)
    if found is None:
        return None
    replay = Answered(*found, known=repeats is not None)
    sending.exchange_id = replay.exchange_id
    sending.end(whole=True)
    return replay
