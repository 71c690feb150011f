"""From sampled ids to text, and from text to what a reply says."""
