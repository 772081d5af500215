"""Which plan runs a problem: what is known, the search for better plans, which one is taken, the verb ``tune``."""
