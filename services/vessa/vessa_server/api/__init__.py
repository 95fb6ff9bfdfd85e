"""The HTTP routes, their dependencies, authentication and error handlers; FastAPI lives here."""
