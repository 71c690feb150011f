from __future__ import annotations

import pytest

from rollout_server.api.errors import ApiError
from rollout_server.api.model_names import adapter_of

ADAPTERS = ["math", "sql"]


@pytest.mark.parametrize(
    ("name", "aliases", "meant"),
    [
        ("tiny", [], ""),
        ("sql", ["*"], "sql"),
        ("tiny", ["*=math"], ""),
        ("gpt-4o", ["gpt-*"], ""),
        ("gpt-4o", ["gpt-*=policy"], ""),
        ("gpt-4o", ["gpt-*=tiny"], ""),
        ("gpt-4o", ["gpt-*=math"], "math"),
        ("gpt-4o-mini", ["*-mini=sql", "gpt-*=math"], "sql"),
        ("o3", ["gpt-*=math", "*"], ""),
    ],
)
def test_names_and_aliases_mean_one_model(name: str, aliases: list[str], meant: str) -> None:
    assert adapter_of(name, "tiny", aliases, ADAPTERS) == meant


@pytest.mark.parametrize(
    ("name", "aliases", "said"),
    [("o3", ["gpt-*"], "tiny, gpt-*, math, sql"), ("gpt-4o", ["gpt-*=law"], "'law', which is not loaded")],
)
def test_a_name_that_means_nothing_is_refused(name: str, aliases: list[str], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        adapter_of(name, "tiny", aliases, ADAPTERS)
    assert (refused.value.status, refused.value.param, refused.value.code) == (404, "model", "model_not_found")
    assert said in refused.value.message
