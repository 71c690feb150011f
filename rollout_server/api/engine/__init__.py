"""The web process's end of the line to the managers."""
