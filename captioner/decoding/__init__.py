"""The search for captions, over anything that can `start` and `step`."""
