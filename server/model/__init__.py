"""From a checkpoint to next tokens: load, attention over a paged cache, sampling, and the runners that join them."""
