"""Text to token ids and back: chat templates, tokenizers, incremental decoding, stop strings. No torch."""
