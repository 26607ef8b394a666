"""What the pool of rewards is made of: its groups and calls, the threads that keep processes, and the
processes.

    jobs        holds groups, a job per function of each, and the calls that come of it
    search      says what to call when a call fails (pure)
    threads     keeps one process: hands calls to it, takes the replies, replaces it
    worker      is the process, seen from both sides
    event_loop  is its life where functions are asynchronous
"""
