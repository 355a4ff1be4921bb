"""Keeps KV blocks after the request that computed them: a host's arena in shared memory, and who may use what of it.

    engine ── scheduler: Reader, Writer ──(unix socket)──▶ CacheServer: Index, Ledger
           └─ worker:    Loader, Storer ──(mapped)───────▶ arena of blocks

`keys` names blocks; `index`, `ranges`, `ledger` are the server's book-keeping; `wire`, `client`, `server` the words
between the processes; `tier` what lies below the arena, `codec` what makes fewer bytes of its blocks; `reader`,
`writer`, `loader`, `storer` what an engine does with them. No engine is imported here.
"""
