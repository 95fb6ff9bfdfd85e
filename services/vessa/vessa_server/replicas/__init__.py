"""Replicas of the service under Ray Serve (experimental: no gain over nginx measured). Needs extra `ray`."""

from vessa_server.replicas.ray_serve import ReplicaScaling, run

__all__ = ["ReplicaScaling", "run"]
