"""Looking inside a model that runs: values of any of its nodes, captured or compared."""
