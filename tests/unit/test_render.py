"""Templates give transformers' text, tools fit any template briefly, demonstrations are what the server would see."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_rl.errors import ModelError
from rollout_server.api.conversation import ConversationIndex
from rollout_server.api.render import Renderer, RenderError, render_demonstration
from rollout_server.api.tool_parsers import parse_reply

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


def with_template(model: Path, target: Path, template: str) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(model / name, target / name)
    (target / "chat_template.jinja").write_text(template)
    return target


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", [None, OWN_TOOLS])
def test_ids_are_those_of_transformers(
    tiny_llama: Path, tmp_path: Path, messages: list[dict[str, Any]], template: str | None
) -> None:
    from transformers import AutoTokenizer

    model = with_template(tiny_llama, tmp_path, template) if template else tiny_llama
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
    content, calls = parse_reply(said, "r")
    assert content == "Let me see."
    assert [(c.name, c.arguments) for c in calls] == [("calculator", '{"expression": "1+1"}')]


def test_stop_ids_hold_the_end_of_a_turn(renderer: Renderer) -> None:
    assert renderer.turn_end_id == 2
    assert renderer.stop_ids == (2,)


def test_templates_that_rewrite_are_noticed_and_said_once(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = Renderer(with_template(tiny_llama, tmp_path, REWRITING))
    assert not renderer.append_only
    assert len([r for r in caplog.records if "rewrites" in r.message]) == 1
    index = ConversationIndex(renderer)
    question = {"role": "user", "content": "Hi"}
    reply = {"role": "assistant", "content": "Hello"}
    index.remember("", [question], reply, [], [5, 6, 2], "call")
    prompt = index.prompt("", [question, reply, question], [])
    assert prompt.parent_id is None
    assert prompt.ids == renderer.prompt([question, reply, question], [])
    with pytest.raises(ModelError, match="rewrites"):
        render_demonstration(renderer, [question, reply, question, reply], [])


def test_append_only_templates_are_recognised(tiny_llama: Path, tmp_path: Path, renderer: Renderer) -> None:
    assert renderer.append_only
    assert Renderer(with_template(tiny_llama, tmp_path, OWN_TOOLS)).append_only


def test_errors_say_what_is_wrong(tiny_llama: Path, tmp_path: Path) -> None:
    refusing = Renderer(
        with_template(
            tiny_llama, tmp_path, "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}Hi"
        )
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
    renderer = Renderer(with_template(tiny_llama, tmp_path, template) if template else tiny_llama)
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
