"""Every framework as its users write it, unchanged, against a real web process: the spans, and the span of every call.

The engine is scripted: an agent's instructions say what the model replies, turn by turn, so that each row takes the same way
every time. What a row leaves behind is written as a tree of spans, with a star for each call that was made in one.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
from agents import add_trace_processor, flush_traces
from agents import trace as agents_trace
from agents.tracing import TracingProcessor
from agents.tracing.processors import default_exporter
from langchain_core.runnables import RunnableLambda
from opentelemetry import trace as otel
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id

from lightning_rl.episode import CallLink, Episode, EpisodeStart, Outcome, Reward, Span, Task
from rollout_server import messages as m
from rollout_server.api.rendering.render import Renderer
from tests.agents import agents_sdk, autogen_agents, instrumented, langchain_agents, mixed, openai_sdk
from tests.integration.scripted_manager import one_by_one
from tests.integration.test_api import END, Setting, Web, fresh_web
from tracers.context import Event, Rollout, running
from tracers.install import install
from tracers.rewards import reward
from tracers.spans import span

pytestmark = pytest.mark.filterwarnings("ignore:Resolved model mismatch")

OURS = {"lightning_rl", "tracers", "rollout_server", "trainers"}
WEATHER = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
BROKEN = WEATHER.replace("weather", "broken")
CONSULT = '<tool_call>{"name": "consult", "arguments": {}}</tool_call>'
HANDOFF = '<tool_call>{"name": "transfer_to_expert", "arguments": {}}</tool_call>'
ANIMAL = '{"name": "cat", "legs": 4}'
MARKERS = ("amber", "cobalt")
numbers = count()


@dataclass(frozen=True)
class Row:
    agent: Callable[[Any], Any]
    plain: str
    tools: str = ""
    """With tools; "" if the agent has none."""
    says: tuple[str, ...] = ("Fine.",)
    says_with_tools: tuple[str, ...] = (WEATHER, "Fine.")
    expert: tuple[str, ...] = ("Fine.",)
    expert_with_tools: tuple[str, ...] = ("Fine.",)

    def __str__(self) -> str:
        return f"{self.agent.__module__.rpartition('.')[2]}.{self.agent.__name__}"

    def task(self, mode: str, marker: str) -> dict[str, Any]:
        tools = bool(self.tools) and mode in ("tools", "concurrent")
        return {
            "instructions": replies(*(self.says_with_tools if tools else self.says)),
            "expert": replies(*(self.expert_with_tools if tools else self.expert)),
            "question": f"The word is {marker}.",
            "stream": mode == "streaming",
            "tools": tools,
        }


ALONE, TWICE = "agent solve *", "agent solve **"
AGENT = """\
    agent solve
      agent helper *"""
AGENT_WITH_TOOL = """\
    agent solve
      agent helper **
        tool weather"""
ROWS = [
    Row(openai_sdk.chat, ALONE, TWICE),
    Row(openai_sdk.async_chat, ALONE, TWICE),
    Row(openai_sdk.responses, ALONE, TWICE),
    Row(openai_sdk.structured, ALONE, says=(ANIMAL,)),
    Row(openai_sdk.raw, ALONE),
    Row(
        langchain_agents.agent,
        """\
        agent solve
          agent helper
            chain model *""",
        """\
        agent solve
          agent helper
            chain model *
            chain model *
            chain tools
              tool weather""",
    ),
    Row(
        langchain_agents.chain,
        """\
        agent solve
          chain RunnableParallel<short,long>
            chain long *
            chain short *""",
        """\
        agent solve *
          tool weather""",
        says_with_tools=("Fine.",),
    ),
    Row(
        langchain_agents.parallel,
        """\
        agent solve
          chain paper
            chain review
              chain reviewers
                chain judge *
            chain write *
            chain write *""",
        """\
        agent solve
          chain paper
            chain review
              chain reviewers
                chain judge *
            chain write *
              tool weather
            chain write *
              tool weather""",
        says_with_tools=("Fine.",),
    ),
    Row(autogen_agents.single, AGENT, AGENT_WITH_TOOL),
    Row(
        autogen_agents.team,
        """\
        agent solve
          agent critic *
          agent writer *""",
        """\
        agent solve
          agent critic **
            tool weather
          agent writer **
            tool weather""",
    ),
    Row(
        autogen_agents.nested,
        """\
        agent solve
          agent editor *
          chain authors
            agent critic *
            agent writer *""",
        """\
        agent solve
          agent editor **
            tool weather
          chain authors
            agent critic **
              tool weather
            agent writer **
              tool weather""",
    ),
    Row(
        autogen_agents.swarm,
        """\
        agent solve
          agent desk *
            handoff transfer_to_expert
          agent expert *""",
        says=(HANDOFF,),
    ),
    Row(agents_sdk.single, AGENT, AGENT_WITH_TOOL),
    Row(
        agents_sdk.desk,
        """\
        agent solve
          agent desk *
            chain polite
            handoff from desk
          agent expert *""",
        """\
        agent solve
          agent desk *
            chain polite
            handoff from desk
          agent expert **
            tool weather""",
        says=(HANDOFF,),
        says_with_tools=(HANDOFF,),
        expert=("", "Fine."),
        expert_with_tools=("", WEATHER, "Fine."),
    ),
    Row(agents_sdk.untraced, AGENT, AGENT_WITH_TOOL),
    Row(
        instrumented.agent,
        """\
        agent solve
          agent helper
            chain thinking *""",
        """\
        agent solve
          agent helper
            chain thinking *
            tool weather""",
        says_with_tools=("Fine.",),
    ),
    Row(
        mixed.agent,
        """\
        agent solve
          chain pipeline
            chain step
              agent desk **
                tool consult
                  agent expert *""",
        says=(CONSULT, "Fine."),
    ),
]


@pytest.fixture(scope="module")
def web(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    install()
    with fresh_web(Setting(tiny_llama, tmp_path_factory.mktemp("web")), Renderer(tiny_llama)) as web:
        yield web


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all: LangChain keeps its connections for the next agent."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(autouse=True)
def _environment(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{web.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


@pytest.mark.parametrize("mode", ["plain", "streaming", "tools"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_spans_and_calls_of_an_agent(row: Row, mode: str, web: Web, loop: asyncio.Runner) -> None:
    follow_instructions(web)
    trace = loop.run(traced(web, row.agent, row.task(mode, MARKERS[0])))
    assert trace.tree == dedent(row.tools if mode == "tools" and row.tools else row.plain)
    trace.check(web, MARKERS[0])


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_two_episodes_at_once_do_not_mix(row: Row, web: Web, loop: asyncio.Runner) -> None:
    follow_instructions(web, together=2)
    tasks = [row.task("concurrent", marker) for marker in MARKERS]

    async def in_one_loop() -> list[Traced]:
        return await asyncio.gather(*(traced(web, row.agent, task) for task in tasks))

    if inspect.iscoroutinefunction(row.agent):
        traces = loop.run(in_one_loop())
    else:
        with ThreadPoolExecutor(2) as pool:
            traces = list(pool.map(lambda task: asyncio.run(traced(web, row.agent, task)), tasks))
    for trace, marker in zip(traces, MARKERS, strict=True):
        assert trace.tree == dedent(row.tools or row.plain)
        trace.check(web, marker)


def test_the_agents_import_nothing_of_ours() -> None:
    files = list(Path(openai_sdk.__file__).parent.glob("*.py"))
    assert len(files) >= 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & (OURS | {"tests", ""}), file


def test_hooks_fit_whichever_import_is_in_the_middle_of_another() -> None:
    """LangChain imports OpenTelemetry's SDK, which imports its API."""
    code = """if True:
        from tracers.install import install
        install()
        from langchain.agents import create_agent
        from langchain_core.runnables import RunnableLambda
        from tracers.context import place_sources
        RunnableLambda(lambda x: x).invoke(1)
        print(len(place_sources))"""
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_tools_arguments_result_and_id_are_recorded(web: Web, loop: asyncio.Runner) -> None:
    for agent, said in ((langchain_agents.agent, {"city": "Paris"}), (agents_sdk.single, '{"city": "Paris"}')):
        follow_instructions(web)
        trace = loop.run(traced(web, agent, Row(agent, AGENT, AGENT).task("tools", MARKERS[0])))
        tool = trace.named("weather")
        assert (tool.attributes["arguments"], tool.attributes["result"]) == (said, "It rains in Paris.")
    follow_instructions(web)
    for agent in (langchain_agents.agent, autogen_agents.single):
        trace = loop.run(traced(web, agent, Row(agent, AGENT, AGENT).task("tools", MARKERS[0])))
        asked = [call["id"] for each in trace.episode.calls for call in each.response.get("tool_calls") or ()]
        assert [trace.named("weather").attributes["tool_call_id"]] == asked


def test_a_tool_that_raises_leaves_its_traceback(web: Web, loop: asyncio.Runner) -> None:
    follow_instructions(web)
    row = Row(langchain_agents.failing, AGENT, says=(BROKEN, "Fine."))
    with pytest.raises(RuntimeError, match="no answer from Paris"):
        loop.run(traced(web, langchain_agents.failing, row.task("plain", MARKERS[0])))
    trace = Traced.read(web, f"failing-{next(numbers) - 1}")
    for name, kind in (("broken", "tool"), ("tools", "chain"), ("helper", "agent")):
        error = trace.named(name, kind).error or ""
        assert error.startswith("Traceback")
        assert "RuntimeError: no answer from Paris" in error
    follow_instructions(web)
    row = Row(agents_sdk.unlucky, AGENT, says=(BROKEN, "Fine."))
    trace = loop.run(traced(web, agents_sdk.unlucky, row.task("plain", MARKERS[0])))
    assert (trace.named("broken").error or "").startswith(
        "Error running tool"
    )  # the SDK itself leaves the exception out
    assert trace.named("preparation", "chain").attributes == {"step": 1}


def test_a_span_that_nobody_ends_is_recorded_when_the_rollout_ends(web: Web, loop: asyncio.Runner) -> None:
    follow_instructions(web, together=2)  # so that the only one is never answered

    async def impatient(task: dict[str, Any]) -> None:
        run = asyncio.ensure_future(langchain_agents.agent(task))
        while not web.manager.submitted or MARKERS[0] not in web.renderer.decode(web.manager.submitted[-1].prompt_ids):
            await asyncio.sleep(0.01)
        left.append(run)

    left: list[asyncio.Future[Any]] = []
    web.manager.submitted.clear()
    trace = loop.run(traced(web, impatient, Row(langchain_agents.agent, AGENT).task("plain", MARKERS[0])))
    left[0].cancel()
    assert [trace.named(*which).error for which in (("helper", "agent"), ("model", "chain"))] == ["never ended"] * 2


def test_rewards_and_own_spans_are_placed_where_the_framework_is(web: Web, loop: asyncio.Runner) -> None:
    async def agent(task: dict[str, Any]) -> None:
        def look(_: Any) -> None:
            reward(0.5, name="looked")
            with span("check"):
                langchain_agents.weather.invoke({"city": "Rome"})

        await RunnableLambda(look).ainvoke("", {"run_name": "look"})

    trace = loop.run(traced(web, agent, {}))
    assert trace.tree == dedent("""\
        agent solve
          chain look
            chain check
              tool weather""")
    assert [(each.name, each.span_id) for each in trace.episode.rewards] == [
        ("looked", trace.named("look", "chain").id)
    ]


def test_an_agents_own_opentelemetry_goes_on_as_before(web: Web, loop: asyncio.Runner) -> None:
    """Its exporter sees its spans, made by tracers from before and after it set its provider; ours come with the same ids."""
    exporter = InMemorySpanExporter()
    instrumented.PROVIDER.add_span_processor(SimpleSpanProcessor(exporter))
    follow_instructions(web)
    trace = loop.run(traced(web, instrumented.agent, Row(instrumented.agent, "", "-").task("plain", MARKERS[0])))
    exported = {each.name: format_span_id(each.context.span_id) for each in exporter.get_finished_spans()}
    assert set(exported) == {"invoke_agent helper", "thinking", "chat gpt-4o"}
    assert trace.named("helper", "agent").id == exported["invoke_agent helper"]
    assert trace.named("thinking", "chain").id == exported["thinking"]
    assert [link.span_id for link in trace.links] == [exported["thinking"]]


def test_who_leaves_a_stream_is_outside_of_what_made_it(web: Web, loop: asyncio.Runner) -> None:
    """Between its items, after `break`, and in spans that begin then; without an error that nobody made."""
    seen: list[str] = []

    async def autogen(task: dict[str, Any]) -> None:
        async for _ in autogen_agents.member("helper", task, autogen_agents.client_of(task)).run_stream(
            task=task["question"]
        ):
            reward(1, name="between")
            if _.source == "helper":
                break
        reward(1, name="after")
        await asyncio.sleep(0.01)
        with otel.get_tracer("own").start_as_current_span("own"):
            reward(1, name="own")

    async def langchain(task: dict[str, Any]) -> None:
        def words(chunks: Iterator[Any]) -> Iterator[str]:
            for chunk in chunks:
                yield str(chunk.content)

        for _ in (langchain_agents.model_of(task) | words).stream(task["instructions"] + task["question"]):
            break
        reward(1, name="after")

    for agent in (autogen, langchain):
        follow_instructions(web)
        trace = loop.run(traced(web, agent, Row(agent, "").task("streaming", MARKERS[0])))
        names = {span.id: span.name for span in trace.episode.spans}
        (root,) = [span.id for span in trace.episode.spans if span.parent_id is None]
        assert {(each.name, names.get(str(each.span_id))) for each in trace.episode.rewards} <= {
            ("between", None),
            ("after", None),
            ("own", "own"),
        }
        assert [span.parent_id for span in trace.episode.spans if span.name == "own"] in ([], [root])
        assert [span.error for span in trace.episode.spans] == [None] * len(trace.episode.spans)
        seen += names.values()
    assert {"helper", "own"} <= set(seen)


OWN_PROVIDER = """if True:
    import asyncio
    from tracers.install import install
    install()
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
    from tracers.context import Rollout, running

    class Mine(TracerProvider):
        def hello(self):
            return "hi"

    async def stream():
        with trace.get_tracer("left").start_as_current_span("stream"):
            yield 1

    async def leave():
        async for _ in stream():
            break
        await asyncio.sleep(0.01)

    with running(Rollout("e", print)):
        asyncio.run(leave())

    standby = trace.get_tracer_provider()
    mine, exporter, events = Mine(sampler=ALWAYS_OFF, resource=Resource({"service.name": "shop"})), InMemorySpanExporter(), []
    mine.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(mine)
    assert trace.get_tracer_provider() is mine
    assert standby.hello() == "hi" and standby.resource is mine.resource
    tracer = trace.get_tracer("own")
    with running(Rollout("e", events.append)):
        with tracer.start_as_current_span("dropped", attributes={"a": 1}) as span:
            assert not span.get_span_context().trace_flags.sampled
    with tracer.start_as_current_span("outside") as span:
        assert not span.is_recording()
    assert [(each.name, each.attributes["a"]) for each in events] == [("dropped", 1)]
    assert exporter.get_finished_spans() == ()
"""


def test_an_agents_own_provider_is_the_one_that_it_set_and_samples_only_for_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", OWN_PROVIDER], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")  # nor is anything logged of a stream that was left before


def test_the_agents_sdk_sends_nothing_of_a_rollout_to_openai(
    web: Web, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(default_exporter(), "export", sent.extend)
    monkeypatch.setattr(default_exporter(), "_export_with_deadline", lambda items, deadline: sent.extend(items))
    heard = Heard()
    add_trace_processor(heard)
    follow_instructions(web)
    for agent, names in ((agents_sdk.single, ["helper"]), (agents_sdk.untraced, [])):
        heard.agents.clear()
        loop.run(traced(web, agent, Row(agent, "").task("plain", MARKERS[0])))
        assert heard.agents == names  # the agent's own processor hears what the agent has not disabled
    flush_traces()
    assert sent == []
    with agents_trace("outside of rollouts"):
        pass
    flush_traces()
    assert [each.name for each in sent] == ["outside of rollouts"]


class Heard(TracingProcessor):
    def __init__(self) -> None:
        self.agents: list[str] = []

    def on_span_end(self, span: Any) -> None:
        if span.span_data.type == "agent":
            self.agents.append(span.span_data.name)

    def on_trace_start(self, trace: Any) -> None: ...
    def on_trace_end(self, trace: Any) -> None: ...
    def on_span_start(self, span: Any) -> None: ...
    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


def replies(*turns: str) -> str:
    """Instructions that the scripted engine follows, a reply for each turn of the conversation; the last for all after."""
    return f"[[{'||'.join(turns)}]]"


def follow_instructions(web: Web, together: int = 1) -> None:
    """The engine says what the instructions say. Nobody is answered before `together` episodes have asked."""
    waiting: list[m.Submit] = []
    asked: set[str] = set()

    def answer(submit: m.Submit) -> list[m.FromManager]:
        text = web.renderer.decode(submit.prompt_ids, special=True)
        found = re.search(r"\[\[(.*?)\]\]", text, re.DOTALL)
        assert found is not None, text
        turns = found[1].split("||")
        turn = text.count("<|im_start|>assistant") - 1
        return one_by_one(submit, [[*web.renderer.encode(turns[min(turn, len(turns) - 1)]), END]])

    def script(submit: m.Submit) -> list[m.FromManager]:
        text = web.renderer.decode(submit.prompt_ids)
        asked.update(marker for marker in MARKERS if marker in text)
        waiting.append(submit)
        if len(asked) < together:
            return []
        ready = [message for each in waiting for message in answer(each)]
        waiting.clear()
        return ready

    web.manager.script = script


@dataclass
class Traced:
    """What is recorded of one episode."""

    episode: Episode
    links: list[CallLink]

    @classmethod
    def read(cls, web: Web, id: str, links: list[CallLink] | None = None) -> Traced:
        return cls(web.store.episode(id), links or [])

    @property
    def tree(self) -> str:
        """The spans of the agent's process (the server's are those that say which call asked for the tool) and the calls."""
        own = [span for span in self.episode.spans if "call_id" not in span.attributes]
        (root,) = [span for span in own if span.parent_id is None]

        def drawn(span: Span) -> str:
            stars = "*" * sum(call.span_id == span.id for call in self.episode.calls)
            below = sorted(drawn(child) for child in own if child.parent_id == span.id)
            return "\n".join([f"{span.kind} {span.name} {stars}".rstrip(), *(indent(each, "  ") for each in below)])

        return drawn(root)

    def named(self, name: str, kind: str = "tool") -> Span:
        (found,) = [
            span
            for span in self.episode.spans
            if (span.name, span.kind) == (name, kind) and "call_id" not in span.attributes
        ]
        return found

    def check(self, web: Web, marker: str) -> None:
        """Every span has ended well, every call is of this episode, and the frameworks' own links say what the requests said."""
        (other,) = set(MARKERS) - {marker}
        assert [span.error for span in self.episode.spans] == [None] * len(self.episode.spans)
        span_ids = {span.id for span in self.episode.spans}
        for call in self.episode.calls:
            text = web.renderer.decode(call.prompt_ids)
            assert marker in text
            assert other not in text
            assert call.span_id in span_ids
        made_in = {call.response_id: call.span_id for call in self.episode.calls}
        assert {link.response_id: link.span_id for link in self.links}.items() <= made_in.items()


async def traced(web: Web, agent: Callable[[Any], Any], task: dict[str, Any]) -> Traced:
    """Run the agent as an episode of its own, in this context."""
    id = f"{agent.__name__}-{next(numbers)}"
    web.store.begin(EpisodeStart(id=id, task=Task(id="t", input={}), phase="train"))
    events: list[Event] = []
    try:
        with running(Rollout(id, events.append, web.url)), span("solve", kind="agent"):
            result = agent(task)
            if inspect.isawaitable(result):
                await result
    finally:
        links = [event for event in events if isinstance(event, CallLink)]
        spans = [event for event in events if isinstance(event, Span)]
        rewards = [event for event in events if isinstance(event, Reward)]
        web.store.end(id, Outcome.COMPLETED, counted=True, spans=spans, rewards=rewards, links=links, ended_at=1.0)
    return Traced.read(web, id, links)
