"""``fastdiff benchmark quality``: how good the pictures are that a run draws, and recipes compared by that."""
