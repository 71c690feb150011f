"""Templates give transformers' text, tools fit any template briefly, demonstrations are what the server would see."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_rl.errors import ModelError
from rollout_server.api.rendering.conversation import ConversationIndex
from rollout_server.api.rendering.render import Renderer, RenderError, render_demonstration
from rollout_server.api.replies.reply import gather
from rollout_server.api.replies.tool_formats import FORMATS
from tests.chat_templates import GEMMA_LIKE, dir_of, kinds, model_dir

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string", "description": "the expression"},
                "digits": {"type": "integer"},
            },
            "required": ["expression"],
        },
    },
}

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界 🌍\n\n"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": " 2 "},
        {"role": "user", "content": "<|im_end|> sure?"},
    ],
]

# Renders tools and tool calls itself, as Qwen's and Hermes's templates do.
OWN_TOOLS = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% generation %}{{ m.content }}{% for c in m.tool_calls %}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}
{%- endgeneration %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Marks replies as old once something follows them.
REWRITING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" and not loop.last %}(earlier) {% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(tiny_llama)


# Shows only what the assistant said last: no stand-in comes through.
HIDING = """\
{% for m in messages %}{% if m.role != "assistant" or loop.last %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [None, OWN_TOOLS])
def test_ids_are_those_of_transformers(
    tiny_llama: Path, tmp_path: Path, messages: list[dict[str, Any]], template: str | None
) -> None:
    from transformers import AutoTokenizer

    model = model_dir(tiny_llama, tmp_path, template) if template else tiny_llama
    tools = [TOOL] if template else []
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert Renderer(model).prompt(messages, tools) == expected


def test_the_web_side_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, rollout_server.api.app, rollout_server.launch; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_tool_costs_at_most_90_tokens(renderer: Renderer) -> None:
    system = {"role": "system", "content": "Use the calculator."}
    with_tool = len(renderer.prompt([system, CHATS[0][0]], [TOOL]))
    assert with_tool - len(renderer.prompt([system, CHATS[0][0]], [])) <= 90


def test_tools_calls_and_results_are_rendered_as_text(renderer: Renderer) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "2"},
    ]
    text = renderer.text(messages, [TOOL])
    assert '"expression": "string: the expression", "digits": "integer, optional"' in text
    said = 'Let me see.\n<tool_call>{"name": "calculator", "arguments": {"expression": "1+1"}}</tool_call>'
    assert f"<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n" in text
    reader = FORMATS["hermes"].parser("r", [TOOL])
    reply = gather([*reader.feed(said), *reader.finish()])
    assert reply.content == "Let me see."
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("calculator", '{"expression": "1+1"}')]


def test_stop_ids_hold_the_end_of_a_turn(renderer: Renderer) -> None:
    assert renderer.turn_end_id == 2
    assert renderer.stop_ids == (2,)


def test_templates_that_rewrite_are_noticed_said_once_and_extended_all_the_same(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = Renderer(model_dir(tiny_llama, tmp_path, REWRITING))
    assert not renderer.append_only
    (record,) = [r for r in caplog.records if "rewrites" in r.message]
    assert "a next question: 'Hello' became '(earlier) Hello<|im_end|" in record.message
    index = ConversationIndex(renderer)
    question = {"role": "user", "content": "Hi"}
    reply = {"role": "assistant", "content": "Hello"}
    index.remember("", [question], reply, [], [5, 6, 2], "call")
    prompt = index.prompt("", [question, reply, question], [])
    assert (prompt.parent_id, prompt.relation) == ("call", "extension")
    assert prompt.ids == [5, 6, 2, *renderer.encode("\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")]


def test_where_no_stand_in_comes_through_conversations_are_rendered_whole_and_labelled(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = Renderer(model_dir(tiny_llama, tmp_path, HIDING))
    assert "not with a next question" in caplog.text
    index = ConversationIndex(renderer)
    question = {"role": "user", "content": "Hi"}
    reply = {"role": "assistant", "content": "Hello"}
    first = index.prompt("", [question], [])
    index.remember("", [question], reply, [], [*first.ids, 6, 2], "call")
    prompt = index.prompt("", [question, reply, question], [])
    assert prompt.ids == renderer.prompt([question, reply, question], [])
    assert (prompt.parent_id, prompt.relation) == (None, "edit")
    assert prompt.parted_at == len(renderer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>"))
    with pytest.raises(ModelError, match="rewrites"):
        render_demonstration(renderer, [question, reply, question, reply], [])


@pytest.mark.parametrize("kind", ["smollm2", "qwen3", "llama3_1", "mistral", "gemma"])
def test_what_templates_do_is_found_out_at_the_start(
    kind: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = Renderer(dir_of(kinds()[kind], tiny_llama, tmp_path))
    said = {
        "smollm2": None,
        "qwen3": "reasoning in a reply: '<think>",
        "llama3_1": "white space around a reply: ' Hello",
        "mistral": "a next question when there are tools",
        "gemma": "white space around a reply: ' Hello",
    }[kind]
    assert renderer.append_only == (said is None)
    assert (said or "") in caplog.text
    assert len(caplog.records) == (said is not None)
    assert renderer.decode([renderer.stop_ids[0]], special=True) == kinds()[kind].eos


def test_a_template_without_roles_for_tools_gets_them_as_questions(tiny_llama: Path, tmp_path: Path) -> None:
    special = kinds()["gemma"].special
    renderer = Renderer(model_dir(tiny_llama, tmp_path, GEMMA_LIKE, special=special, bos_token="<bos>"))
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "a", "content": "2"},
        {"role": "tool", "tool_call_id": "b", "content": "3"},
        {"role": "user", "content": "So?"},
    ]
    text = renderer.text(messages, [TOOL])
    assert text.startswith("<bos><start_of_turn>user\nCall a tool by replying")
    answered = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>\nSo?<end_of_turn>\n"
    assert text.endswith(f"<start_of_turn>user\n{answered}<start_of_turn>model\n")
    with pytest.raises(RenderError, match="no system role"):
        renderer.text([{"role": "system", "content": "S"}, *messages], [TOOL])


def test_options_reach_the_template_and_what_is_no_option_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    renderer = Renderer(dir_of(kinds()["qwen3"], tiny_llama, tmp_path))
    messages = CHATS[0]
    calm = renderer.prompt(messages, [], {"enable_thinking": False})
    assert renderer.decode(calm, special=True).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert renderer.ends_with(calm, "</think>")
    assert not renderer.ends_with(calm, "<think>")
    assert renderer.ends_with([*renderer.prompt(messages, []), *renderer.encode("<think>\n")], "<think>")
    with pytest.raises(RenderError, match="'tools' cannot be set"):
        renderer.prompt(messages, [], {"tools": []})


def test_an_unfinished_message_is_left_open(renderer: Renderer, tiny_llama: Path, tmp_path: Path) -> None:
    begun = [*CHATS[0], {"role": "assistant", "content": "The answer "}]
    opened = renderer.text(begun, [], continues=True)
    assert opened.endswith("<|im_start|>assistant\nThe answer ")
    with pytest.raises(RenderError, match="only a message of the assistant"):
        renderer.text(CHATS[0], [], continues=True)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(RenderError, match="calls tools"):
        renderer.text([*CHATS[0], {"role": "assistant", "content": "", "tool_calls": [call]}], [], continues=True)
    trimming = Renderer(dir_of(kinds()["gemma"], tiny_llama, tmp_path))
    assert trimming.text(begun, [], continues=True).endswith("<start_of_turn>model\nThe answer ")


def test_special_tokens_that_somebody_types_become_special_tokens(renderer: Renderer) -> None:
    """As in transformers, vLLM and SGLang; but what the policy samples as text is never read as one."""
    typed = renderer.prompt([{"role": "user", "content": "<|im_end|>"}], [])
    assert typed.count(2) == 1 + renderer.prompt([{"role": "user", "content": "x"}], []).count(2)
    spelled = [i for part in ("<|im", "_end|>") for i in renderer.encode(part)]
    reply = {"role": "assistant", "content": renderer.decode(spelled)}
    index = ConversationIndex(renderer)
    first = index.prompt("", CHATS[0], [])
    index.remember("", CHATS[0], reply, [], [*first.ids, *spelled, 2], "c")
    assert index.prompt("", [*CHATS[0], reply, *CHATS[0]], []).ids[len(first.ids) :][: len(spelled)] == spelled


DEEP = "[" * 5000
HOSTILE: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "\ud83d"}],
    [{"role": "assistant", "content": None}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": "{{ 7 * 7 }}{% for %}\x00\ufffe"}],
    [{"role": "user", "content": "x"}] * 2000,
    [{"role": "user", "content": "a" * 200_000}],
    *(
        [
            CHATS[0][0],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "\ud83d", "function": {"name": "f", "arguments": a}}],
            },
            {"role": "tool", "content": "x", "tool_call_id": "\ud83d"},
        ]
        for a in ("", "null", "NaN", DEEP, "1" * 5000, '{"a": "\\ud83d"}', "[1]", '{"x": 1e999}')
    ),
]


@pytest.mark.parametrize("kind", ["smollm2", "qwen3", "llama3_1", "mistral", "gemma"])
def test_hostile_messages_are_rendered_or_refused_soon(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    renderer = Renderer(dir_of(kinds()[kind], tiny_llama, tmp_path))
    index = ConversationIndex(renderer)
    odd: Any = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 5}, "required": 3}}}
    for messages in HOSTILE:
        for tools in ([], [odd], [TOOL]):
            started = time.monotonic()
            try:
                prompt = index.prompt("", messages, tools)
                index.remember("", messages, {"role": "assistant", "content": "\ud83d"}, tools, [*prompt.ids, 17], "c")
                index.prompt("", [*messages, {"role": "assistant", "content": "\ud83d"}, CHATS[0][0]], tools)
            except RenderError as error:
                str(error).encode("utf-8", "surrogatepass")
            assert time.monotonic() - started < 60


def test_append_only_templates_are_recognised(tiny_llama: Path, tmp_path: Path, renderer: Renderer) -> None:
    assert renderer.append_only
    assert Renderer(model_dir(tiny_llama, tmp_path, OWN_TOOLS)).append_only


def test_errors_say_what_is_wrong(tiny_llama: Path, tmp_path: Path) -> None:
    refusing = Renderer(
        model_dir(tiny_llama, tmp_path, "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}Hi")
    )
    with pytest.raises(RenderError, match="too many"):
        refusing.prompt([{"role": "user", "content": "x"}] * 4, [])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RenderError, match="no chat template"):
        Renderer(tmp_path).prompt([{"role": "user", "content": "x"}], [])
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="line 1"):
        Renderer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Renderer(tmp_path)


@pytest.mark.parametrize("template", [None, OWN_TOOLS])
def test_a_demonstration_is_what_the_server_sees_turn_by_turn(
    tiny_llama: Path, tmp_path: Path, template: str | None
) -> None:
    renderer = Renderer(model_dir(tiny_llama, tmp_path, template) if template else tiny_llama)
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Use the tool."},
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
        {"role": "assistant", "content": "The answer is 42."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You're welcome."},
    ]
    ids, mask = render_demonstration(renderer, messages, [TOOL])
    assert renderer.decode(ids, special=True) + "\n" == renderer.text(messages, [TOOL], generation_prompt=False)
    index = ConversationIndex(renderer)
    seen: list[int] = []
    for at in (2, 4, 6):
        prompt = index.prompt("e", messages[:at], [TOOL])
        assert (prompt.parent_id is None) == (at == 2)
        assert prompt.ids[: len(seen)] == seen
        said = ids[len(prompt.ids) : ids.index(2, len(prompt.ids)) + 1]
        seen = prompt.ids + said
        assert ids[: len(seen)] == seen
        assert mask[len(prompt.ids) : len(seen)] == [1] * len(said)
        index.remember("e", messages[:at], messages[at], [TOOL], seen, f"call-{at}")
    assert seen == ids
    assert sum(mask) == sum(len(renderer.spoken(messages, [TOOL], at)) for at in (2, 4, 6))


def test_a_demonstration_ends_with_the_assistant(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="must end with"):
        render_demonstration(renderer, CHATS[2], [])
