"""Keys and roles, rate limits, the audit log."""
