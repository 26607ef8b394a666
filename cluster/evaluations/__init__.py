"""The evaluations of a run on its driver's side: what is open, what came of it, and the best version kept."""
