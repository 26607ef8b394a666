"""The learner: pure mathematics (agro, objectives, logprobs, packing), and around it the ZeRO-3 ranks
that train.
"""
