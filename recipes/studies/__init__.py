"""Studies: small experiments that back what the documentation advises."""
