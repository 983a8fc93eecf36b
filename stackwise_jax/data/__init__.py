"""Text in, packed rows out: sources, the tokenizer, the prepared corpus, and the Grain pipeline over it."""
