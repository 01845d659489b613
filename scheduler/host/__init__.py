"""The host: the only room that reads /proc and imports psutil; registrations, attempts' folders, signals."""
