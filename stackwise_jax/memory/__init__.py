"""Where numbers live and as what: storage precision, fingerprints, the activation cache, budgets."""
