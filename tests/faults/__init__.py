"""Faults: real processes killed, servers lost, disks filled, clocks moved; and a checker that trusts nothing of the store's code.

`make test` runs every test here in a short form, `make test-faults` in full (`LIMAML_FAULTS=full`).

    preload.c    what is put before libc in a process: it ends, or its disk is full, at a chosen call; its clock is wrong
    nursery.py   a process with everything imported, which forks one `limaml …` at a time
    world.py     members who click one after the other, and what must be known of each after any number of clicks
    raw.py       the bytes of a store, by their documentation alone
    checker.py   what must be there against what is there
    wire.py      a line to a server, which is cut, goes dead and is mended
    bad.py       bad requests of all kinds, for HTTP and gRPC
"""
