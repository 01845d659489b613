"""The tests: `bin/test` runs them, `bin/test --faults` those that kill, hang and cut off."""
