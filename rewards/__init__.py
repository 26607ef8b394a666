"""Rewards: what a reward function is, the built-in functions, and the pool of killable workers that runs
them.

A reward function scores the completions of one prompt. It takes by name what it needs:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]
    def accuracy(completions: list[str], solution: list[str], **kwargs) -> list[float]

Each argument is a list with one entry per completion. An argument that is neither `prompts` nor `completions`
is a column of the dataset, the row's value repeated, for example `answer=["72", "72"]`; a column that is
missing is found before anything starts. With `?messages` behind its name in the config, or annotated
`completions: list[list[dict]]`, the function gets prompts and completions as lists of messages. None for a
completion means "could not be scored", which is an error and never reward 0.

A function may have an attribute `answer(completion: str) -> str | None`: what a completion votes for as its
answer (`majority@k`), the same text for equal answers. The first configured function that has one is asked.
Where it returns None or fails, the completion votes for its own text.

    registry      turns a name or `module:function` into a function
    signature     decides how a function is called
    check         asks, before anything starts, whether the functions can score the data
    scoring       scores one group and checks every value (pure)
    pool          scores groups in processes that can be killed (worker)
    exact_match   the built-in function that compares texts
    math          the built-in function that compares mathematics
    golds         says what a gold answer may be
    final_answer  finds the part of a text that is the answer
    notation      rewrites it as LaTeX that means what a person meant
    formulas      says what it means, and compares
    bounded       calls functions in a time that is bounded
"""
