"""Index-addressed data: the state of a data source is the step number."""
