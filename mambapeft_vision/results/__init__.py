"""Results: the record of a run, and what is made from records."""
