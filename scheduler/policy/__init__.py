"""Policy: pure functions of what they are given; no clock, no I/O, no third-party library."""
