"""Which plan runs a problem: tuned plans and where they are kept, the search for better ones, its results."""
