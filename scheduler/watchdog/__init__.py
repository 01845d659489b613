"""The watchdog: one per host, standard library and psutil; samples, decides, kills, never marks."""
