"""Rewards: what a reward function is, the built-in functions, and the pool of killable workers that runs
them.

A reward function scores the completions of one prompt. It takes by name what it needs:

    def my_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]
    def accuracy(completions: list[str], solution: list[str], **kwargs) -> list[float]
    async def judged(completions: list[str], **kwargs) -> list[float | Exception]

Each argument is a list with one entry per completion. `num_tokens` is how many tokens were sampled, and
`environments` what may be seen of the environment that each was said to: its public attributes. Any other
argument is a column of the dataset, the row's value repeated, for example `answer=["72", "72"]`; a column
that is missing is found before anything starts. With `?messages` behind its name in the config, or annotated
`completions: list[list[dict]]`, the function gets prompts and completions as lists of messages, a
conversation of several turns as a whole.

None for a completion means that the function does not apply to it: it is left out of the weighted sum, and an
error where no other function scored. An exception in its place is its error. Neither is ever reward 0.
Where a call raises, hangs or ends its process, its completions are asked about one by one, and then those
that did not fail together: a function may see a completion again, and a group without some of its members
(workers/search.py).

A function may have attributes. `answer(completion: str) -> str | None` is what a completion votes for as its
answer (`majority@k`), the same text for equal answers. The first configured function that has one is asked;
where it returns None or fails, the completion votes for its own text. `timeout_s` is the function's own limit
for one call, where it is longer than `rewards.timeout_s`. `prepare()` is called once in each process, before
the first call.

    registry      turns a name or `module:function` into a function
    signature     decides how a function is called
    check         asks, before anything starts, whether the functions can score the data
    scoring       calls a function, checks every value, and sums (pure)
    pool          scores groups in processes that can be killed
    workers/      is what the pool is made of: calls, threads, processes, and what to call when a call fails
    exact_match   the built-in function that compares texts
    math          the built-in function that compares mathematics
    judge         asks a language model over the OpenAI API (pace: how often a machine does)
    overlong      the built-in function that punishes answers near the limit of tokens
    golds         says what a gold answer may be
    final_answer  finds the part of a text that is the answer
    notation      rewrites it as LaTeX that means what a person meant
    formulas      says what it means, and compares
    bounded       calls functions in a time that is bounded
"""
