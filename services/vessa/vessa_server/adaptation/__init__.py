"""A bank's own weights: fine-tuned in the background, kept only if they help."""
