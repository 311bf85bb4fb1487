"""A training run -> one HTML page that holds everything it shows: no network, no script, no other file."""
