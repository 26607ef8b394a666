"""Chat templates of our own, and harnesses that talk by one."""
