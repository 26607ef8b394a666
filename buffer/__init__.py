"""The shared replay buffer: durable, bounded in staleness, paced by admission.

records    what travels between the rooms
admission  which WorkItems exist, and who may lease how many (pure)
usable     what of a group is worth storing (pure)
sampling   which stored groups a batch takes (pure)
order      stored groups in order of insertion and of age (pure)
replay     the index of stored groups and its eviction rules (pure)
store      groups, leases and batches on disk: sqlite, write-ahead log
ledger     what happened to every item: JSONL, and its auditor
layout     what belongs to which shard, under which name
shard      the parts joined: one shard, every change in memory and on disk
server     its waits: an asyncio class, a Ray actor in a run
shards     the shards as one buffer: what everybody else calls
"""
