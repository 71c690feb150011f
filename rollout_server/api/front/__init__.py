"""Who is let in, how much, and in what form the answer goes out."""
