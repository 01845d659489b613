"""The commands: arguments to settings to one call; exit codes."""
