"""One command each; results are committed under results/ with the hardware named. Nothing here is a test."""
