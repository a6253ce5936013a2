"""Prompt texts: the chat template of the thinking test variant and the Hermes tool instruction.

Owns: the words. Does not own: rendering (chat.py). The tool format is Hermes', which SmolLM2, Qwen and
vLLM's `hermes` parser share: one `<tool_call>` element with a JSON object per call.
"""

from __future__ import annotations

# One definition per line of `{tools}`, each the JSON of a function.
TOOLS_SYSTEM = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

_HEAD, _TAIL = (part.replace("{{", "{").replace("}}", "}") for part in TOOLS_SYSTEM.split("{tools}\n"))

# SmolLM2's own template (same default system prompt, same turns), with tools and with an opened chain.
# Earlier turns are rendered exactly as they came: no thinking is stripped, so prefixes stay cached.
SMOLLM2_THINKING = (
    """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -%}
{%- set turns = messages -%}
{%- endif -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- '\\n\\n"""
    + _HEAD.replace("\n", "\\n")
    + """' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
{{- '"""
    + _TAIL.replace("\n", "\\n")
    + """' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in turns -%}
{%- if message['role'] == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{{- '\\n<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' -}}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{{- '\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false -}}
{%- endif -%}
"""
)
