"""Tools, calls and results as the JSON that Mistral's templates write, and the same in jinja.

Source: mistral-common's instruct tokenizers. What is JSON in a string (a call's arguments, a tool's result) is read and
written anew, so that white space and escapes are always the same; a result that is no JSON is written as a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tune.data.conversation import BadRowError, Message
from tune.secrets import redact


def tools_json(tools: tuple[Mapping[str, Any], ...]) -> str:
    """The tools of a conversation, each with its name, description and parameters.

    Raises:
        BadRowError: a tool is not a function with a name.
    """
    return as_json([_tool(tool) for tool in tools])


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRowError(f"a tool is no {{type: function, function: {{name, …}}}} ({_shown(tool)})")
    kept = {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {},
    }
    return {"type": "function", "function": kept}


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The calls of an answer as {name, arguments, id}, the id None where there is none.

    Raises:
        BadRowError: a call is not one of a function with a name, or its arguments are not a JSON object.
    """
    calls = message.extra.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise BadRowError(f"tool_calls is no list of calls ({_shown(calls)})")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRowError(f"a tool call is no {{id, function: {{name, arguments}}}} ({_shown(call)})")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise BadRowError(f"the arguments of the call of {function['name']} are not JSON ({error})") from None
    if not isinstance(arguments, Mapping):
        raise BadRowError(f"the arguments of the call of {function['name']} are no JSON object ({_shown(arguments)})")
    id = call.get("id")
    return {"name": function["name"], "arguments": arguments, "id": None if id in (None, "", "null") else str(id)}


def calls_json(calls: list[dict[str, Any]], *, ids: bool) -> str:
    """Calls as Mistral's models write them, with their ids or without."""
    return as_json([{k: v for k, v in call.items() if k != "id" or (ids and v is not None)} for call in calls])


def read_result(content: str) -> Any:
    """What a tool returned: the value that its JSON means, or the text itself where it is none."""
    try:
        return json.loads(content or "{}")
    except ValueError:
        return content


def as_json(value: Any) -> str:
    """JSON as Python writes it by default, in Unicode.

    Raises:
        BadRowError: JSON has no form for the value, or it holds half a surrogate pair.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_mapping)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError("a tool, call or result holds half a surrogate pair, which is no character") from None
    return text


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise BadRowError(f"a tool, call or result holds what JSON cannot express ({_shown(value)})")


def _shown(value: Any) -> str:
    text = redact(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}…"


JINJA_TOOLS = """\
{%- set offered = namespace(tools=[]) -%}
{%- for tool in tools or [] -%}
    {%- set function = {
        'name': tool['function']['name'],
        'description': tool['function']['description'] or '',
        'parameters': tool['function']['parameters'] or {},
    } -%}
    {%- set offered.tools = offered.tools + [{'type': 'function', 'function': function}] -%}
{%- endfor -%}
"""
"""The jinja twin of `tools_json`: sets `offered.tools`."""

JINJA_CALLS = """\
{%- macro calls_json(calls, ids) -%}
    {{- '[' -}}
    {%- for call in calls -%}
        {%- set arguments = call['function']['arguments'] or {} -%}
        {{- '{"name": ' + call['function']['name']|tojson + ', "arguments": ' -}}
        {{- arguments if arguments is string else arguments|tojson -}}
        {%- if ids and call['id'] and call['id'] != 'null' -%}
            {{- ', "id": ' + call['id']|tojson -}}
        {%- endif -%}
        {{- '}' if loop.last else '}, ' -}}
    {%- endfor -%}
    {{- ']' -}}
{%- endmacro -%}
"""
"""The jinja twin of `calls_json`. It cannot read JSON: arguments in a string are written as they stand."""

JINJA_RESULT = """\
{%- macro result_content(content) -%}
    {%- set text = (content if content is string else content|tojson)|trim -%}
    {%- if not content and content is string -%}
        {{- '{}' -}}
    {%- elif text[:1] + text[-1:] in ['{}', '[]'] or text in ['true', 'false', 'null'] -%}
        {{- text -}}
    {%- elif text[-1:] in '0123456789' and text in [text|int|string, text|float|string] -%}
        {{- text -}}
    {%- elif text[:1] + text[-1:] == '""' and text.count('"') == 2 and '\\\\' not in text and '\\n' not in text -%}
        {{- text -}}
    {%- else -%}
        {{- content|tojson -}}
    {%- endif -%}
{%- endmacro -%}
"""
"""The jinja twin of how a result is written. It cannot read JSON: what looks like it is written as it stands."""
