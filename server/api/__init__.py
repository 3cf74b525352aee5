"""The HTTP surface: wire models, and one router per group of endpoints. Nothing here knows about tensors."""
