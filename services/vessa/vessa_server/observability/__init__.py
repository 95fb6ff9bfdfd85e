"""Logs, metrics, request context and trace export."""
