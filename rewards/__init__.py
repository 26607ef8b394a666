"""Rewards: the protocol, the built-in functions, and the pool of killable workers that runs them.

A reward function scores the completions of one prompt, and takes by name what it needs:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]
    def accuracy(completions: list[str], solution: list[str], **kwargs) -> list[float]

All lists have one entry per completion. What is neither `prompts` nor `completions` is a dataset column of
the row, repeated, for example `answer=["72", "72"]`; one that is missing is found before anything starts.
With `messages: true` beside its name, or annotated `completions: list[list[dict]]`, it gets prompts and
completions as lists of messages. None for a completion means "could not be scored": an error, never reward 0.

A function may have an attribute `answer(completion: str) -> str | None`: what of a completion votes as its
answer (`agro.target: majority@k`), the same text for equal answers. The first configured function that has
one is asked; after None, or a failure, the completion votes for its own text.

    registry   name or `module:function` -> function          signature  how it is called        check     before anything starts
    scoring    one group, checked (pure)                      pool       the same in processes that can be killed (worker, memory)
    exact_match, math   the built-in functions                golds      what a gold answer may be
    final_answer        which part of a text is the answer    formulas   what it means           bounded   in a time that is bounded
"""
