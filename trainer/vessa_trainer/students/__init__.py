"""Student networks, their checkpoints and inference."""
