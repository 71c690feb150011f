"""What only a server can do to an episode store: restart, refuse, be shared. The rest is in tests/unit/test_store*.py, for both."""

import threading
import time

import pytest

from lightning_rl.episode import Outcome, Reward, Span
from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from lightning_rl.store.postgres import Postgres, run_url
from tests.integration.served_web import served
from tests.unit.domain import make_call, make_start


def test_nothing_is_lost_or_doubled_while_connections_break_and_the_server_restarts(postgres):
    """What a writer was told is written is there once, also when it heard only at the second try."""
    url, done, failures = postgres.url(), [], []

    def write(store, name):
        try:
            store.begin(make_start(name))
            for number in range(60):
                call = make_call(range(number + 1), [1], id=f"{name}-{number}", episode_id=name, index=number)
                store.add_calls([call], [Span(id=f"s{number}", episode_id=name, name="n", kind="tool")])
                store.add_rewards([Reward(episode_id=name, name="r", value=1.0, time=float(number))])
                done.append(call.id)
                time.sleep(0.01)
            store.end(name, Outcome.COMPLETED, counted=True, ended_at=1.0)
        except StoreError as error:
            failures.append(error)

    with Store.open(url) as one, Store.open(url) as other:
        threads = [threading.Thread(target=write, args=(store, name)) for name, store in
                   [("a", one), ("b", one), ("c", other)]]  # fmt: skip
        for thread in threads:
            thread.start()
        for broken in range(8):
            seen = len(done)
            while len(done) < seen + 10 and any(thread.is_alive() for thread in threads):
                time.sleep(0.005)
            if broken == 4:
                postgres.stop("immediate")
                time.sleep(0.3)
                postgres.start()
            else:
                postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ 'calls|rewards'"
                             " AND pid <> pg_backend_pid()")  # fmt: skip
        for thread in threads:
            thread.join(60)
        assert not failures
        for episode in one.episodes():
            assert [call.index for call in episode.calls] == list(range(60))
            assert [len(call.prompt_ids) for call in episode.calls] == list(range(1, 61))
            assert sorted(reward.time for reward in episode.rewards) == list(range(60))
            assert (len(episode.spans), episode.outcome) == (60, Outcome.COMPLETED)
        assert len(one.episodes()) == 3


def test_a_server_that_stays_away_is_an_error_that_says_what_to_do(postgres, monkeypatch):
    monkeypatch.setattr(Postgres, "patience_s", 0.3)
    url = postgres.url()
    with Store.open(url) as store:
        store.begin(make_start())
        postgres.stop("immediate")
        try:
            for place in (store.begin, lambda start: Store.open(url.replace("lrl@", "lrl:hunter2@"))):
                with pytest.raises(
                    StoreError, match=r"cannot (open|write to) the episode store postgresql://lrl"
                ) as caught:
                    place(make_start("f"))
                assert "is the server running" in caught.value.hint
                assert "hunter2" not in str(caught.value)
        finally:
            postgres.start()
        store.begin(make_start("f"))


def test_runs_that_share_a_database_do_not_see_each_other(postgres):
    base = postgres.url().partition("&run=")[0]
    for run in ("shared/2026-01-01 10", 'shared"; DROP', "x" * 64):
        with pytest.raises(StoreError, match="run= in the episode store's URL must be a name"):
            Store.open(run_url(base, run))
    for number, run in enumerate(("shared/2026-01-01_10-00-00", "shared/2026-01-01_10-00-01")):
        assert run_url(run_url(base, run), "another") == run_url(base, run)
        with Store.open(run_url(base, run)) as store:
            assert run in store.place
            store.begin(make_start(step=number))
            assert [summary.step for summary in store.starts()] == [number]


def test_looking_makes_no_schema_and_says_which_runs_there_are(postgres):
    postgres.sql("CREATE DATABASE looked")
    base = f"postgresql://lrl@/looked?host={postgres.directory}"
    with pytest.raises(StoreError, match="there is no run calculater in postgresql://") as caught:
        Store.open(run_url(base, "calculater"), create=False)
    assert "nor is there any other" in caught.value.hint
    for run in ("calculator", "pg_stat"):
        with Store.open(run_url(base, run)) as store:
            store.begin(make_start(run))
        with Store.open(run_url(base, run), create=False) as store:
            assert [summary.id for summary in store.starts()] == [run]
    with pytest.raises(StoreError, match="there is no run calculater in postgresql://") as caught:
        Store.open(run_url(base, "calculater"), create=False)
    assert caught.value.hint.endswith("calculator, pg_stat")
    with pytest.raises(StoreError, match="there is no run in postgresql://"):
        Store.open(base, create=False)
    assert "calculater" not in postgres.sql("SELECT schema_name FROM information_schema.schemata", "looked")


def test_an_end_waits_for_calls_that_are_being_written(postgres):
    """So that whoever reads the episode after its end has all of it."""
    with Store.open(postgres.url()) as store:
        store.begin(make_start())
        began = threading.Event()

        def write(connection):
            prepared = store._calls.prepare([make_call([1], [2])])
            store._insert_calls(connection, prepared)
            began.set()
            time.sleep(0.3)

        writing = threading.Thread(target=store._transactions.write, args=(write,))
        writing.start()
        began.wait(10)
        store.end("e", Outcome.COMPLETED, counted=True, ended_at=1.0)
        assert len(store.episode("e").calls) == 1
        writing.join()


def test_databases_that_cannot_hold_a_store_are_refused(postgres):
    with pytest.raises(StoreError, match='database "nowhere" does not exist') as caught:
        Store.open(postgres.url("nowhere"))
    assert "createdb" in caught.value.hint
    postgres.sql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match="keeps text as LATIN1"):
        Store.open(postgres.url("latin"))
    postgres.sql("CREATE DATABASE crowded")
    postgres.sql("CREATE TABLE calls (id int)", "crowded")
    with pytest.raises(StoreError, match="has tables of these names that are not the episode store's: calls") as caught:
        Store.open(f"postgresql://lrl@/crowded?host={postgres.directory}")
    assert "?run=NAME" in caught.value.hint
    url = postgres.url("crowded")
    Store.open(url).close()
    schema = f'"{url.rpartition("=")[2]}"'
    postgres.sql(f"UPDATE {schema}.lightning_rl_store SET version = 99", "crowded")
    with pytest.raises(StoreError, match="has version 99"):
        Store.open(url)


def test_a_store_of_version_3_is_brought_up_to_date(postgres):
    url = postgres.url()
    with Store.open(url) as store:
        store.begin(make_start())
        store.add_call(make_call([1], [2]))
    schema = f'"{url.rpartition("=")[2]}"'
    database = url.partition("?")[0].rpartition("/")[2]
    postgres.sql(
        f"ALTER TABLE {schema}.calls DROP COLUMN restricted, DROP COLUMN entropies, DROP COLUMN alternatives;"
        f" UPDATE {schema}.lightning_rl_store SET version = 3",
        database,
    )
    postgres.sql(
        f"CREATE ROLE looker LOGIN; GRANT USAGE ON SCHEMA {schema} TO looker;"
        f" GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO looker",
        database,
    )
    looking = url.replace("lrl@", "looker@")
    with pytest.raises(StoreError, match=r"cannot bring up to date .*must be owner of table calls") as caught:
        Store.open(looking, create=False)
    assert "as the owner of its tables" in caught.value.hint
    recorded = {"entropies": [0.5], "alternatives": [[(3, -0.5), (4, -1.25)]]}
    call = make_call([1], [3], id="d", index=1, restricted=["top_k"], **recorded)
    for _ in range(2):
        with Store.open(url) as store:
            store.add_call(call)
            assert store.episode("e").calls == [make_call([1], [2]), call]
    with Store.open(looking, create=False) as store:
        assert len(store.episode("e").calls) == 2


def test_a_password_comes_from_the_environment_and_shows_nowhere(postgres, monkeypatch):
    monkeypatch.setenv("LRL_TEST_PASSWORD", "p@ss/w:rd")
    url = postgres.url().replace("lrl@", "lrl:${LRL_TEST_PASSWORD}@")
    with Store.open(url) as store:
        assert store._transactions._reader.url.password == "p@ss/w:rd"
        assert "p@ss" not in store.place
        with pytest.raises(StoreError) as caught:
            store.episode("unknown")
        assert "***" in str(caught.value)
    monkeypatch.setenv("LRL_TEST_URL", url.replace("${LRL_TEST_PASSWORD}", "word"))
    Store.open("${LRL_TEST_URL}").close()
    with pytest.raises(
        StoreError, match="variable LRL_UNSET_PASSWORD, which the episode store's URL names, is not set"
    ):
        Store.open("postgresql://lrl:${LRL_UNSET_PASSWORD}@/postgres")
    with Store.open("${LRL_TEST_URL}?run=another") as store:
        assert store.place.endswith(url.rpartition("=")[2])  # the URL itself has named one
    with pytest.raises(StoreError, match="URL cannot be read") as caught:
        Store.open("postgresql://lrl:hunter2@host:port/db")
    assert "hunter2" not in repr(caught.value) + str(caught.value.__cause__)


def test_a_server_records_its_episodes_there_and_outlives_a_restart(postgres, tiny_llama):
    url = postgres.url()
    with Store.open(url) as store, served(tiny_llama, store=url, aliases=["*"]) as running:
        store.begin(make_start())
        assert running.post("/e/e/v1/chat/completions").status_code == 200
        postgres.stop("immediate")
        starting = threading.Timer(0.5, postgres.start)
        starting.start()
        assert running.post("/e/e/v1/chat/completions").status_code == 200
        starting.join()
        assert [call.sampled_ids for call in store.episode("e").calls] == [[100], [100]]
