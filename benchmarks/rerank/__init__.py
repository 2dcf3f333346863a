"""Two-stage retrieval, beside the loop that was published."""
