"""Arrays in, arrays out: attention and its masks, rotary positions, the loss. Knows no model and no config."""
