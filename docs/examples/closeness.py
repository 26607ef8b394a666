"""A reward that is 1 for the right number, and falls with the distance from it."""


def closeness(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    rewards = []
    for said, gold in zip(completions, answer, strict=True):
        distance = abs(int(said) - int(gold)) if said.isdigit() else float("inf")
        rewards.append(1 / (1 + distance))
    return rewards
