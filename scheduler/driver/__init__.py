"""The driver's side effects: the loop, the study's writer, the journal, the run folder, what a dead driver left."""
