"""What a model is asked: each objective turns a batch into an example (inputs, targets, weights)."""
