"""Protocols of viewers that are no part of VESSA; each module speaks one of them."""
