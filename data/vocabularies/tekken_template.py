"""The templates of Mistral's models, by the version of their tekken.json, as Jinja texts equal to mistral-common.

v3 puts the system text into the last user turn. The tools come before the last user turn, from v13 on before the first.
"""

_TEXT = """
{%- set ns = namespace(first=-1, last=-1, before='', system='') -%}
{%- for m in messages -%}
    {%- if m.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('it knows no role ' + m.role) -}}
    {%- elif m.role == ns.before and m.role != 'tool' or m.role == 'system' and not loop.first -%}
        {{- raise_exception('it takes no ' + m.role + ' message after a ' + ns.before + ' message') -}}
    {%- elif m.role == 'user' -%}
        {%- set ns.last = loop.index0 -%}
        {%- if ns.first < 0 -%}{%- set ns.first = loop.index0 -%}{%- endif -%}
    {%- endif -%}
    {%- set ns.before = m.role -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}
        {%- if version == 3 -%}
            {%- set ns.system = m.content -%}
        {%- else -%}
            {{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' -}}
        {%- endif -%}
    {%- elif m.role == 'user' -%}
        {%- if tools and loop.index0 == (ns.last if version < 13 else ns.first) -%}
            {{- '[AVAILABLE_TOOLS][' -}}
            {%- for tool in tools -%}
                {{- '{"type": "function", "function": {"name": ' + tool.function.name | tojson -}}
                {{- ', "description": ' + (tool.function.description or '') | tojson -}}
                {{- ', "parameters": ' + tool.function.parameters | tojson + '}}' + ('' if loop.last else ', ') -}}
            {%- endfor -%}
            {{- '][/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' + (ns.system + '\\n\\n' if ns.system and loop.index0 == ns.last else '') -}}
        {{- m.content + '[/INST]' -}}
    {%- elif m.role == 'tool' -%}
        {%- if version == 3 -%}
            {{- raise_exception('version 3 writes what tools answer as parsed JSON, which is not done here') -}}
        {%- endif -%}
        {{- '[TOOL_RESULTS]' + (m.tool_call_id + '[TOOL_CONTENT]' if version < 13 else '') -}}
        {{- m.content + '[/TOOL_RESULTS]' -}}
    {%- else -%}
        {%- if version == 3 and m.content and m.tool_calls -%}
            {{- raise_exception('version 3 writes no text beside calls') -}}
        {%- endif -%}
        {%- if version >= 13 and m.reasoning_content -%}
            {{- '[THINK]' + m.reasoning_content + '[/THINK]' + (m.content or '') -}}
        {%- else -%}
            {{- (m.content or '').rstrip(' ') -}}
        {%- endif -%}
        {%- if m.tool_calls and version < 11 -%}
            {{- '[TOOL_CALLS][' -}}
            {%- for call in m.tool_calls -%}
                {{- '{"name": ' + call.function.name | tojson -}}
                {{- ', "arguments": ' + call.function.arguments | tojson -}}
                {{- (', "id": ' + call.id | tojson if call.id else '') + '}' + ('' if loop.last else ', ') -}}
            {%- endfor -%}
            {{- ']' -}}
        {%- else -%}
            {%- for call in m.tool_calls or [] -%}
                {{- '[TOOL_CALLS]' + call.function.name -}}
                {{- '[CALL_ID]' + call.id if call.id and version == 11 else '' -}}
                {{- '[ARGS]' + call.function.arguments | tojson -}}
            {%- endfor -%}
        {%- endif -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
TEMPLATES = {f"v{number}": f"{{%- set version = {number} -%}}{_TEXT}" for number in (3, 7, 11, 13)}
