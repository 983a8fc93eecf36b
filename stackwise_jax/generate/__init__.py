"""New text from a trained rack, one token after another."""
