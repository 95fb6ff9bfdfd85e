"""Request bytes to checked inputs and results to response bytes; no FastAPI, no torch."""
