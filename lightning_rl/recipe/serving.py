"""The sections of a recipe about what runs beside the training: the server, what is recorded, where metrics and traces go."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lightning_rl.recipe.fields import Count, DatabaseUrl, HttpUrl, Pattern, Section, VariableName


class Server(Section):
    """The rollout server."""

    kv_tokens: Count = 65536
    """Tokens whose keys and values fit in the cache."""
    max_batch: Count = 64
    """Sequences that decode at once."""
    page_size: Count = 16
    """Tokens in a page of the cache."""
    threads: Count | None = None
    """CPU threads of the worker; null leaves the choice to torch."""
    batch_invariant: bool = False
    """Same seed, same tokens and log-probs bit for bit, whatever else is in the batch. Slower; it makes a resumed run
    equal an uninterrupted one in every bit."""

    @model_validator(mode="after")
    def _cache_holds_a_page(self) -> Self:
        if self.kv_tokens < self.page_size:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) must be at least page_size ({self.page_size})")
        return self


class Wandb(Section):
    """Weights & Biases."""

    project: Annotated[str, Field(min_length=1)] = "lightning-rl"
    """Project that the run is logged to."""
    mode: Literal["auto", "offline", "online", "disabled"] = "auto"
    """`auto`: online if a key is configured, else offline. It never asks."""


class Otlp(Section):
    """Episodes as OpenTelemetry traces, sent by OTLP/HTTP after each step and evaluation."""

    endpoint: HttpUrl
    """Base URL of the collector, as in OTEL_EXPORTER_OTLP_ENDPOINT: `/v1/traces` is appended."""
    headers_env: VariableName | None = None
    """Environment variable with headers, as OTEL_EXPORTER_OTLP_HEADERS has them: `key=value,key=value`."""
    content: bool = False
    """Whether prompts, replies, answers, and tools' arguments and results are sent, too."""


class Recording(Section):
    """What is stored of the agent's calls."""

    redact: list[Pattern] = []
    """Regular expressions for secrets: what fits is taken out of every text before it is stored. A call that held one loses the
    tokens of it, too, and is not trained on. A text in which a pattern is not found out within some seconds is withheld whole.
    Keys that are known (of the server, of `upstreams`, of the environment) are taken out without being named here."""
    store: DatabaseUrl | None = None
    """URL of a PostgreSQL database; null keeps episodes in the run's own SQLite file. A password stands in an environment
    variable, `postgresql://user:${NAME}@host/db`. Each run has a schema of its own there, unless the URL names one: `?run=NAME`."""


class Tracking(Section):
    """Where metrics go besides the run directory."""

    wandb: Wandb | None = None
    """null does not use W&B."""
    otlp: Otlp | None = None
    """null does not send traces."""
