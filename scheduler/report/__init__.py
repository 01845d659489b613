"""The report of a run: one file that says what happened, why, what it cost, and what to run next."""
