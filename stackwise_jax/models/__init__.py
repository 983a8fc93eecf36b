"""The Transformer: Flax Linen leaves up to a block, plain functions of a tree of arrays above it."""
