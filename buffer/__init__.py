"""The shared replay buffer: durable, bounded in staleness, paced by admission.

records    what travels between the rooms
admission  which WorkItems exist, and who may lease how many (pure)
sampling   which stored groups a batch takes (pure)
replay     the index of stored groups and its eviction rules (pure)
store      groups on disk: sqlite, write-ahead log
ledger     what happened to every item: JSONL, and its auditor
server     the asyncio class that joins them; a Ray actor in a run
"""
