"""What an evaluation is made of: the items that are open, and the estimates that come of their samples."""
