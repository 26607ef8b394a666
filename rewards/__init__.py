"""Rewards: the protocol, the built-in functions, and the pool of killable workers that runs them.

A reward function scores the completions of one prompt:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]

All lists have one entry per completion. `columns` holds every dataset column of the row, repeated, for example
`answer=["72", "72"]`. None for a completion means "could not be scored": an error, never reward 0.

A function may have an attribute `answer(completion: str) -> str | None`: what of a completion votes as its answer
(`agro.target: majority@k`). The first configured function that has one is asked; None, or a failure, is no vote.

    registry   name or `module:function` -> function          scoring   one group, checked (pure)
    exact_match, math   the built-in functions                 pool      the same in processes that can be killed
"""
