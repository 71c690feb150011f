"""The tables of the episode store, the same for every database.

Token ids and versions are packed as little-endian int32, log-probs as float64, so that what is read is bit for bit what
was sampled; entropies and alternatives' log-probs as float32, which is what an engine gives. What has no fixed shape (task
input, request, response, answer, attributes) is JSON text in ASCII. Of a call's prompt and request only what differs from its
base is there (`store.deltas`). Columns that lists need stand first or in an index, so that no list reads what is long. What
others name, in any length, is in a hash index (PostgreSQL's trees take 2,700 bytes), what is a key has a bound (`store.rows`).
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)
from sqlalchemy.types import TypeEngine

SCHEMA_VERSION = 5
UPGRADES = {
    1: (
        "ALTER TABLE calls ADD COLUMN relation TEXT NOT NULL DEFAULT 'root'",
        "ALTER TABLE calls ADD COLUMN parted_at INTEGER",
    ),
    2: (
        "ALTER TABLE calls ADD COLUMN agent TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE calls ADD COLUMN response_id TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE calls ADD COLUMN upstream TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE calls ADD COLUMN redacted BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE calls ADD COLUMN base_id TEXT",
        "ALTER TABLE calls ADD COLUMN base_tokens INTEGER NOT NULL DEFAULT 0",
        "DROP INDEX IF EXISTS ix_calls_episode_id",
        'CREATE INDEX IF NOT EXISTS calls_in_order ON calls (episode_id, "index", sampled_tokens)',
        "CREATE INDEX IF NOT EXISTS calls_by_response ON calls (response_id)",
        "ALTER TABLE rewards ADD COLUMN source TEXT NOT NULL DEFAULT 'unknown'",
        "ALTER TABLE rewards ADD COLUMN key TEXT NOT NULL DEFAULT ''",
        "UPDATE rewards SET key = number",
        "CREATE UNIQUE INDEX IF NOT EXISTS rewards_once ON rewards (episode_id, key) WHERE key <> ''",
        "CREATE INDEX IF NOT EXISTS spans_by_parent ON spans (parent_id)",
    ),
    3: ("ALTER TABLE calls ADD COLUMN restricted TEXT NOT NULL DEFAULT '[]'",),
    4: ("ALTER TABLE calls ADD COLUMN entropies BYTEA", "ALTER TABLE calls ADD COLUMN alternatives BYTEA"),
}
"""What turns a store of one version into one of the next; PostgreSQL begins with version 3. A process of an older version may go
on with a store that was brought up to date: before 3 it gives rewards no keys, before 4 it does not say what restricted a call,
before 5 it leaves out entropies and alternatives. BYTEA is PostgreSQL's word; SQLite keeps bytes as they are under any."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


class Visible(TypeDecorator[str]):
    """Text, in the order of its bytes. What no database writes, NUL and lone surrogates, becomes ␀ and U+FFFD."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text(collation="C" if dialect.name == "postgresql" else None))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else visible(value)


def visible(text: str) -> str:
    return _UNWRITABLE.sub(lambda found: "␀" if found[0] == "\0" else "\ufffd", text)


metadata = MetaData()
episodes = Table(
    "episodes",
    metadata,
    Column("id", Visible, primary_key=True),
    Column("phase", Visible, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("task_id", Visible, nullable=False),
    Column("sample", BigInteger, nullable=False),
    Column("attempt", BigInteger, nullable=False),
    Column("group", Visible, nullable=False),
    Column("sampling", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("outcome", Text),
    Column("counted", Boolean, nullable=False, default=False),
    Column("ended_at", Float, nullable=False, default=0.0),
    Column("task_input", Text, nullable=False),
    Column("answer", Text),
    Column("error", Visible),
    Index("episodes_by_phase", "phase", "step"),
)
calls = Table(
    "calls",
    metadata,
    Column("id", Visible, primary_key=True),
    Column("episode_id", Visible, ForeignKey("episodes.id"), nullable=False),
    Column("index", BigInteger, nullable=False),
    Column("model", Visible, nullable=False),
    Column("sampled_tokens", Integer, nullable=False),
    Column("temperature", Float, nullable=False),
    Column("finish_reason", Visible, nullable=False),
    Column("parent_id", Visible),
    Column("relation", Visible, nullable=False),
    Column("parted_at", BigInteger),
    Column("span_id", Visible),
    Column("agent", Visible, nullable=False),
    Column("response_id", Visible, nullable=False),
    Column("upstream", Visible, nullable=False),
    Column("redacted", Boolean, nullable=False),
    Column("restricted", Text, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("base_id", Visible),
    Column("base_tokens", Integer, nullable=False),
    Column("prompt_ids", LargeBinary, nullable=False),
    Column("sampled_ids", LargeBinary, nullable=False),
    Column("logprobs", LargeBinary, nullable=False),
    Column("versions", LargeBinary, nullable=False),
    Column("experts", LargeBinary),
    Column("request", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("entropies", LargeBinary),
    Column("alternatives", LargeBinary),
    Index("calls_in_order", "episode_id", "index", "sampled_tokens"),
    Index("calls_by_response", "response_id", postgresql_using="hash"),
)
"""`prompt_ids` are those behind the first `base_tokens` of the base's prompt + sampled ids. `entropies` and `alternatives` are NULL
where there are none; how the latter are packed is in `store.rows`."""
spans = Table(
    "spans",
    metadata,
    Column("episode_id", Visible, ForeignKey("episodes.id"), primary_key=True),
    Column("id", Visible, primary_key=True),
    Column("name", Visible, nullable=False),
    Column("kind", Visible, nullable=False),
    Column("parent_id", Visible),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("attributes", Text, nullable=False),
    Column("error", Visible),
    Index("spans_by_parent", "parent_id", postgresql_using="hash"),
)
rewards = Table(
    "rewards",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("episode_id", Visible, ForeignKey("episodes.id"), nullable=False),
    Column("name", Visible, nullable=False),
    Column("value", Float, nullable=False),
    Column("time", Float, nullable=False),
    Column("call_id", Visible),
    Column("span_id", Visible),
    Column("source", Visible, nullable=False),
    Column("key", Text, nullable=False),
    Index("rewards_once", "episode_id", "key", unique=True),
)
"""The key tells a reward that is written again from one that is given again."""
version_table = Table("lightning_rl_store", MetaData(), Column("version", Integer, nullable=False))
"""Where a PostgreSQL database has the version; an SQLite file has it in its header."""
