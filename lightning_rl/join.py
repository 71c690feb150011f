"""How a request says which episode and which span it belongs to: what both ends of a connection must agree on.

A request to the rollout server carries its episode in one of three ways, the first that is there counts: the header
`EPISODE_HEADER`, the URL's path (`/e/<episode>/v1/…`), or the end of the API key (`KEY/e/<episode>`). The span that made it
comes in `SPAN_HEADER`, the name of the agent or node in `AGENT_HEADER`. What cannot send headers is joined afterwards, by the
id of the response that it got (`episode.CallLink`).
"""

from __future__ import annotations

from urllib.parse import quote, unquote

EPISODE_HEADER = "x-lrl-episode"
SPAN_HEADER = "x-lrl-span"
"""The id of the innermost span that is open where the request is made."""
AGENT_HEADER = "x-lrl-agent"
"""Name of the agent (or graph node) that makes the request, percent-encoded UTF-8."""
LONGEST_AGENT = 256
"""Characters of an agent's name that travel with a request."""
_KEY_MARK = "/e/"


def episode_url(server_url: str, episode_id: str) -> str:
    """Where an episode's calls go, without `/v1`: the base URL of Anthropic's clients and the OTLP endpoint."""
    return f"{server_url.rstrip('/')}/e/{episode_id}"


def episode_key(key: str, episode_id: str) -> str:
    """An API key that also says whose calls are made with it."""
    return f"{key}{_KEY_MARK}{episode_id}"


def split_key(presented: str) -> tuple[str, str | None]:
    """The API key, and the episode if the key says one."""
    key, mark, episode_id = presented.rpartition(_KEY_MARK)
    return (key, episode_id) if mark and episode_id else (presented, None)


def encode_agent(name: str) -> str:
    """Any name as the value of a header; of a very long one the beginning."""
    return quote(name[:LONGEST_AGENT], safe="/@.:+-_", errors="replace")


def decode_agent(value: str) -> str:
    return unquote(value)
