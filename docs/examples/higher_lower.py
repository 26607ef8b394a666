"""A game in plain text: the policy guesses a number, and is told whether it is higher or lower."""


class HigherLower:
    def reset(self, answer, **row):
        self.answer, self.num_guesses = int(answer), 0

    def step(self, text):  # what the policy said
        self.num_guesses += 1
        guess = int(text) if text.strip().isdigit() else 0
        if guess == self.answer or self.num_guesses == 5:
            return "", float(guess == self.answer), True  # what it sees next, the reward, whether it is over
        return "higher" if guess < self.answer else "lower", None, False
