"""Tools for LoRA adapters and their files: converting, extracting, exchanging, routing, formats of other programs."""
