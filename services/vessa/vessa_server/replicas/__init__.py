"""Replicas of the service under Ray Serve (experimental: no gain over nginx measured). Needs extra `ray`."""

from vessa_server.replicas.ray_serve import Scale, run

__all__ = ["Scale", "run"]
