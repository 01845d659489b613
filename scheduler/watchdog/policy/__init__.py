"""What the watchdog decides by: samples in, verdicts out. Pure."""
