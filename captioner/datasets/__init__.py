"""Caption files, checked examples, stored features and batches."""
