"""Faults with real processes and real signals; run with bin/test --faults."""
