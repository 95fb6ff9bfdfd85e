"""Request bytes to checked inputs, results to response bytes."""
