"""Questions that are answered from a library: the policy looks words up, then answers."""

PAGES = {"llama": "A llama is 1.7 m tall.", "alpaca": "An alpaca is 0.9 m tall."}


class Library:
    def reset(self, answer, **row):  # the columns of the dataset's row
        self.answer, self.given, self.num_looks = answer, None, 0
        return "\nUse the tools to answer."  # is added to the row's prompt; None: nothing

    def look_up(self, word: str) -> str:
        """
        Looks a word up in the library.

        Args:
            word: The word, in small letters.
        """
        self.num_looks += 1
        return PAGES[word]  # a KeyError is told to the policy, which goes on

    def give_answer(self, answer: str) -> str:
        """
        Gives the final answer.

        Args:
            answer: The answer, for example "2 m".
        """
        self.given = answer
        return "thank you"

    def get_reward(self):  # optional: without it the reward functions score
        return float(self.given == self.answer)
