"""Server replay: the same arrivals over HTTP against server processes within a memory budget."""
