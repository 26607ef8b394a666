"""The learner: pure mathematics (objectives, log-probs, packing), and around it the ZeRO-3 ranks
that train.
"""
