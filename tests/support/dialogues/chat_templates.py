"""Chat templates of six families, in our own words and with the structure of theirs: what each puts around a
message, where tools and their results stand, what it strips, rewrites and refuses.

    llama3    begins with BOS; strips content; the tools stand in the first message of the user; one call a turn
    qwen25    ChatML with a system message of its own; results of tools are the user's, side by side in one
    qwen3     as qwen25; thoughts are left out of answers before the user's last message
    smollm2   ChatML, any role, knows no tools
    gemma     begins with BOS; strips content; the roles are user and model in turn, no system, no tools
    mistral   begins with BOS; the tools stand before the user's last message; an answer ends in EOS
"""

from __future__ import annotations

from typing import NamedTuple

LLAMA3 = """{{ bos_token }}
{%- set ns = namespace(rest=messages, system="") -%}
{%- if messages[0].role == "system" -%}
  {%- set ns.system = messages[0].content | trim -%}{%- set ns.rest = messages[1:] -%}
{%- endif -%}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + ns.system + "<|eot_id|>" -}}
{%- if tools -%}
  {{- "<|start_header_id|>user<|end_header_id|>\\n\\nYou may call one of these functions, as JSON:\\n\\n" -}}
  {%- for tool in tools %}{{- tool | tojson(indent=4) + "\\n\\n" -}}{% endfor -%}
  {{- ns.rest[0].content | trim + "<|eot_id|>" -}}{%- set ns.rest = ns.rest[1:] -%}
{%- endif -%}
{%- for m in ns.rest -%}
  {%- if m.tool_calls -%}
    {%- if m.tool_calls | length != 1 %}{{ raise_exception("one call a turn") }}{% endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" -}}
  {%- elif m.role in ("tool", "ipython") -%}
    {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + m.content | trim + "<|eot_id|>" -}}
  {%- else -%}
    {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content | trim + "<|eot_id|>" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}{% endif -%}
"""

_CHATML_HEAD = """
{%- set ns = namespace(own=messages[0].role == "system", last=-1) -%}
{%- if tools -%}
  {{- "<|im_start|>system\\n" -}}
  {%- if ns.own %}{{- messages[0].content + "\\n\\n" -}}{% endif -%}
  {{- "# Tools\\n\\nYou may call these:\\n<tools>" -}}
  {%- for tool in tools %}{{- "\\n" + tool | tojson -}}{% endfor -%}
  {{- '\\n</tools>\\n\\nWrite <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' -}}
{%- elif ns.own -%}
  {{- "<|im_start|>system\\n" + messages[0].content + "<|im_end|>\\n" -}}
"""
_CHATML_RESULT = """
  {%- elif m.role == "tool" -%}
    {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- "<|im_start|>user" -}}{% endif -%}
    {{- "\\n<tool_response>\\n" + m.content + "\\n</tool_response>" -}}
    {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- "<|im_end|>\\n" -}}{% endif -%}
  {%- endif -%}
{%- endfor -%}
"""
_CHATML_CALLS = """
    {%- for call in m.tool_calls or [] -%}
      {%- if m.content or not loop.first %}{{- "\\n" -}}{% endif -%}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- call.function.arguments | tojson + "}\\n</tool_call>" -}}
    {%- endfor -%}
    {{- "<|im_end|>\\n" -}}
"""

QWEN25 = (
    _CHATML_HEAD
    + """
{%- else -%}
  {{- "<|im_start|>system\\nYou are made of tests.<|im_end|>\\n" -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == "user" or (m.role == "system" and not loop.first) -%}
    {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" -}}
  {%- elif m.role == "assistant" -%}
    {{- "<|im_start|>assistant\\n" + (m.content or "") -}}
"""
    + _CHATML_CALLS
    + _CHATML_RESULT
    + """
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" -}}{% endif -%}
"""
)

QWEN3 = (
    _CHATML_HEAD
    + """
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == "user" and not m.content.startswith("<tool_response>") %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == "user" or (m.role == "system" and not loop.first) -%}
    {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" -}}
  {%- elif m.role == "assistant" -%}
    {%- set content, thought = m.content or "", "" -%}
    {%- if "</think>" in content -%}
      {%- set thought = content.split("</think>")[0].split("<think>")[-1].strip("\\n") -%}
      {%- set content = content.split("</think>")[-1].lstrip("\\n") -%}
    {%- endif -%}
    {{- "<|im_start|>assistant\\n" -}}
    {%- if loop.index0 > ns.last and (loop.last or thought) -%}
      {{- "<think>\\n" + thought + "\\n</think>\\n\\n" + content -}}
    {%- else %}{{- content -}}{% endif -%}
"""
    + _CHATML_CALLS
    + _CHATML_RESULT
    + """
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
  {%- if enable_thinking is defined and not enable_thinking %}{{- "<think>\\n\\n</think>\\n\\n" -}}{% endif -%}
{%- endif -%}
"""
)

SMOLLM2 = """
{%- if messages[0].role != "system" %}{{- "<|im_start|>system\\nYou are small.<|im_end|>\\n" -}}{% endif -%}
{%- for m in messages -%}
  {{- "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" -}}{% endif -%}
"""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == "system" %}{{ raise_exception("no system role") }}{% endif -%}
{%- for m in messages -%}
  {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("user and model in turn") }}{% endif -%}
  {{- "<start_of_turn>" + ("model" if m.role == "assistant" else m.role) + "\\n" -}}
  {{- m.content | trim + "<end_of_turn>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\\n" -}}{% endif -%}
"""

MISTRAL = """{{ bos_token }}
{%- set ns = namespace(rest=messages, system="", count=0, last=-1) -%}
{%- if messages[0].role == "system" -%}
  {%- set ns.system = messages[0].content + "\\n\\n" -%}{%- set ns.rest = messages[1:] -%}
{%- endif -%}
{%- for m in ns.rest -%}
  {%- if m.role == "user" or (m.role == "assistant" and not m.tool_calls) -%}
    {%- if (m.role == "user") != (ns.count % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif -%}
    {%- set ns.count = ns.count + 1 -%}
  {%- endif -%}
  {%- if m.role == "user" %}{%- set ns.last = loop.index0 -%}{% endif -%}
{%- endfor -%}
{%- for m in ns.rest -%}
  {%- if m.role == "user" -%}
    {%- if tools and loop.index0 == ns.last %}{{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" -}}{% endif -%}
    {{- "[INST] " + (ns.system if loop.last else "") + m.content + "[/INST]" -}}
  {%- elif m.tool_calls -%}
    {{- "[TOOL_CALLS] [" -}}
    {%- for call in m.tool_calls -%}
      {%- if call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif -%}
      {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson -}}
      {{- ', "id": "' + call.id + '"}' + ("" if loop.last else ", ") -}}
    {%- endfor -%}
    {{- "]" + eos_token -}}
  {%- elif m.role == "assistant" -%}
    {{- " " + m.content + eos_token -}}
  {%- elif m.role == "tool" -%}
    {%- if m.tool_call_id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif -%}
    {{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + ', "call_id": "' + m.tool_call_id -}}
    {{- '"}[/TOOL_RESULTS]' -}}
  {%- else %}{{ raise_exception("no role " + m.role) }}
  {%- endif -%}
{%- endfor -%}
"""


class Family(NamedTuple):
    """A template with the special tokens it needs; `opening` is what an answer begins with, which the
    template writes and the policy samples.
    """

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    opening: str = ""


_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "qwen25": Family(QWEN25, _CHATML, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": Family(QWEN3, _CHATML, None, "<|im_end|>", "<|im_end|>"),
    "smollm2": Family(SMOLLM2, _CHATML, None, "<|endoftext|>", "<|im_end|>"),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>"
    ),
    "mistral": Family(
        MISTRAL,
        (
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "<s>",
        "</s>",
        "</s>",
        " ",
    ),
}
