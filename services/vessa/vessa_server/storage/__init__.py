"""Files and Redis connections that the stores share."""
