"""`limaml stream`: the sources against real servers, decoding, dead letters, and the worker, killed and started again."""
