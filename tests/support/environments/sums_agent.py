"""An agent for the tiny model that says digits, slow enough to be met while it talks."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from openai import AsyncOpenAI

PACE_S = 0.2
MARKS = "SUMS_MARKS"
"""The environment variable that names the directory of marks."""


async def agent(client: AsyncOpenAI, prompt: str, answer: str) -> float:
    """Asks, doubts, and asks something else in a conversation of its own; the first answer counts."""
    mark = Path(os.environ[MARKS], f"talk-{os.getpid()}")
    messages = [{"role": "user", "content": prompt}]
    first = await client.chat.completions.create(model="policy", messages=messages)
    text = first.choices[0].message.content or ""
    mark.touch()
    await asyncio.sleep(PACE_S)
    doubt = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "1+1="}]
    await client.chat.completions.create(model="policy", messages=doubt)
    await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "2+2="}])
    return float(text == answer) + sum(map(str.isdigit, text)) / 10
