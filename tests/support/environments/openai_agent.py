"""An agent as somebody wrote it with the `openai` package before it was trained: it knows nothing of AGRO."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]


async def solve(client: AsyncOpenAI, prompt: str) -> float:
    """Talks three turns with tools, the second a stream that a stop text ends, and tries the last twice."""
    messages: list[Any] = [{"role": "system", "content": "Add."}, {"role": "user", "content": prompt}]
    first = await client.chat.completions.create(
        model="gpt-4o", messages=messages, tools=TOOLS, temperature=0.2, max_tokens=12
    )
    reply = first.choices[0].message
    messages.append(reply)
    for call in reply.tool_calls or []:
        arguments = json.loads(call.function.arguments)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(arguments)})
    if not reply.tool_calls:
        messages.append({"role": "user", "content": "Try again."})
    text = ""
    stream: Any = await client.chat.completions.create(
        model="gpt-4o", messages=messages, tools=TOOLS, stream=True, stop=["e", "\n"]
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    messages.append({"role": "assistant", "content": text})
    best = 0.0
    for question in ("Sure?", "Really?"):
        last = await client.chat.completions.create(
            model="gpt-4o", messages=[*messages, {"role": "user", "content": question}], tools=TOOLS
        )
        assert last.usage is not None
        best += last.usage.completion_tokens
    return best


async def compare(client: AsyncOpenAI, prompt: str) -> float:
    """Asks three questions at once."""
    replies = await asyncio.gather(
        *(
            client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": f"{prompt} {number}"}], max_tokens=8
            )
            for number in range(3)
        )
    )
    return float(sum(len(reply.choices[0].message.content or "") for reply in replies))
