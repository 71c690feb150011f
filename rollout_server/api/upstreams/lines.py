"""Connections to upstreams: made when the first is asked, kept for the next, given back at the end of the process."""

from __future__ import annotations

from functools import cached_property
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

CONNECT_S = 20.0
"""That a connection may take; an answer may take as long as the request that waits for it."""


class Lines:
    @cached_property
    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        nobodys = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # what one episode is given is not the next one's
        return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_S), limits=limits, cookies=nobodys)

    async def close(self) -> None:
        if "client" in self.__dict__:
            await self.client.aclose()
