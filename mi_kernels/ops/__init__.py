"""One folder for each family of operations: schema, derivative rules, plan, reference, portable."""
