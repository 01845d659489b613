"""Adapters: one third-party library each, and no policy."""
