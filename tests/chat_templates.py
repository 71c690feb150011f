"""Model directories for tests of rendering: the tiny model's tokenizer with a template and the special tokens it uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

# As Mistral's: tools stand before the last question, ids of calls have nine letters or digits, roles take turns.
MISTRAL_LIKE = """\
{%- if messages[0].role == "system" -%}
{%- set system = messages[0].content -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set turns = messages -%}{%- endif -%}
{%- set last = namespace(question=-1, index=0) -%}
{%- for m in turns -%}
{%- if m.role == "user" -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- if m.role == "user" or (m.role == "assistant" and not m.tool_calls) -%}
{%- if (m.role == "user") != (last.index % 2 == 0) -%}{{- raise_exception("roles must take turns") -}}{%- endif -%}
{%- set last.index = last.index + 1 -%}
{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in turns -%}
{%- if m.role == "user" -%}
{%- if tools and loop.index0 == last.question -%}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}
[INST] {% if loop.index0 == last.question and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]
{%- elif m.role == "tool" -%}
{%- if m.tool_call_id | length != 9 -%}{{- raise_exception("ids of calls have nine characters") -}}{%- endif -%}
[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls -%}
[TOOL_CALLS] [{% for c in m.tool_calls %}
{%- if c.id | length != 9 -%}{{- raise_exception("ids of calls have nine characters") -}}{%- endif -%}
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}
{%- if not loop.last %}, {% endif -%}
{%- endfor -%}]{{ eos_token }}
{%- else %} {{ m.content | trim }}{{ eos_token }}{%- endif -%}
{%- endfor -%}"""

# As Gemma's: no system message, the roles `user` and `model` in turn, everything trimmed.
GEMMA_LIKE = """\
{{ bos_token }}{% if messages[0].role == "system" %}{{ raise_exception("no system role") }}{% endif %}
{%- for m in messages %}
{%- if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
{{- "<start_of_turn>" + ("model" if m.role == "assistant" else m.role) + "\\n" + m.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}{% if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""


@dataclass(frozen=True)
class Kind:
    source: str | None
    """None leaves the model its own template."""
    special: tuple[str, ...]
    eos: str
    bos: str = "<|im_start|>"


def trl(name: str) -> str:
    """A template that TRL ships, as its model's makers wrote it."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def kinds() -> dict[str, Kind]:
    chatml = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    llama = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
    mistral = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
    return {
        "smollm2": Kind(None, (), "<|im_end|>"),
        "qwen3": Kind(trl("qwen3"), ("<think>", "</think>", *chatml), "<|im_end|>"),
        "llama3_1": Kind(trl("llama3_1"), (*llama, "<|python_tag|>"), "<|eot_id|>", bos="<|begin_of_text|>"),
        "mistral": Kind(MISTRAL_LIKE, (*mistral, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), "</s>", bos="<s>"),
        "gemma": Kind(GEMMA_LIKE, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", bos="<bos>"),
        "qwen2_5": Kind(trl("qwen2_5"), chatml, "<|im_end|>"),
    }


def model_dir(model: Path, target: Path, source: str | None, *, special: Sequence[str] = (), **tokens: str) -> Path:
    """`model`'s tokenizer with more special tokens, and another template; `tokens` as in tokenizer_config.json."""
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(target / "tokenizer.json"))
    config = json.loads((model / "tokenizer_config.json").read_text()) | tokens
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {"eos_token_id": tokenizer.token_to_id(config["eos_token"]), "vocab_size": tokenizer.get_vocab_size()}
    (target / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | ids))
    template = source if source is not None else (model / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").write_text(template)
    return target


def dir_of(kind: Kind, model: Path, target: Path) -> Path:
    return model_dir(model, target, kind.source, special=kind.special, bos_token=kind.bos, eos_token=kind.eos)
