"""The shared replay buffer: durable, bounded in staleness, paced by admission.

admission  says which WorkItems exist, and who may lease how many (pure)
usable     says what of a group is worth storing (pure)
sampling   chooses which stored groups a batch takes (pure)
order      keeps stored groups in order of insertion and of age (pure)
replay     is the index of stored groups, with its eviction rules (pure)
store      keeps groups, leases and batches on disk: sqlite, write-ahead log
ledger     tells what happened to every item, as JSON lines, and audits them
layout     says what belongs to which shard, under which name
shard      joins these parts to one shard: every change is made in memory and on disk
server     adds the waits of its callers: an asyncio class, a Ray actor in a run
shards     is what everybody else calls: all shards as one buffer
"""
