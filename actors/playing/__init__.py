"""Episodes of several turns: `player` begins them in environments, `played` is one of them."""
