"""From bytes to items and from results to bytes; nothing here knows FastAPI or torch."""
