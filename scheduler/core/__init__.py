"""The brain: trials' lives, who holds how many bytes, what was learnt, what follows from an end. Pure."""
