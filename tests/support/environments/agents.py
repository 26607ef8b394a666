"""Harnesses as users write them: whatever they ask goes to the policy, and what they return is the reward."""

from __future__ import annotations

import asyncio
from typing import Any


async def agent(client: Any, model: str, question: str, answer: str, seed: int) -> float:
    """Asks twice, and is content with the answer's letters."""
    said = ""
    for _ in range(2):
        messages = [{"role": "user", "content": f"{question} {said} {seed}"}]
        reply = await client.chat.completions.create(model=model, messages=messages)
        said = reply.choices[0].message.content
    return float(said == answer)


def plain_agent(client: Any, base_url: str, question: str, **row: Any) -> None:
    """Asks once, with no event loop, and leaves the reward to the reward functions."""
    assert base_url.startswith("http://127.0.0.1")
    assert row == {"answer": "4"}
    client.chat.completions.create(model="policy", messages=[{"role": "user", "content": question}])


async def broken_agent(client: Any, **row: Any) -> float:
    """Does what its row says."""
    if row["deed"] == "hang":
        await asyncio.sleep(600)
    if row["deed"] == "ask":
        await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "fail"}])
    raise KeyError(row["deed"])
