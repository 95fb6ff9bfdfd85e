"""Files and Redis connections that everything kept relies on."""
