"""What the user decided: the schema, where a value may come from, and reading it."""
