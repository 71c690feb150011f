"""From messages to token ids, and what this server said before."""
