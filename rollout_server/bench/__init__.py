"""`lrl bench`: the engine measured beside its peers on the same token ids, against the machine's own limit."""
