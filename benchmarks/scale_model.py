"""How many images a second some replicas make: a discrete-event model of docs/scale.md.

Clients keep a fixed number of requests in flight. A request crosses the network (all share one link), waits
for the replica with the shortest queue, which works on one batch at a time, and the answer crosses the link
again. The last line is one JSON object.
"""

import argparse
import heapq
import itertools
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """replicas, in_flight (requests) and batch (images a request): counts; all times in s.

    batch_s, image_s: a replica takes batch_s + n x image_s for n images; store_s: Redis, one after
    another, for each request; link_s: the shared link, one after another, for each image, there and back
    """

    replicas: int
    in_flight: int
    batch: int
    image_s: float
    batch_s: float = 0.0
    store_s: float = 0.0
    link_s: float = 0.0


class Line:
    """A station that serves one after another."""

    def __init__(self) -> None:
        self.free_at = self.busy = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return when someone who comes now is done."""
        self.free_at = max(self.free_at, now) + seconds
        self.busy += seconds
        return self.free_at


def simulate(setup: Setup, requests: int = 2000) -> dict[str, float]:
    """Return images_per_s, and the share of the time that each kind of station is busy.

    Raises ValueError where a count is not positive.
    """
    if min(setup.replicas, setup.in_flight, setup.batch, requests) < 1:
        raise ValueError(f"expected counts of at least 1, got {setup} and {requests} requests")
    link, store, replicas = Line(), Line(), [Line() for _ in range(setup.replicas)]
    crossing = setup.batch * setup.link_s / 2
    order = itertools.count()
    # (when, order, step) of each request: 0 sends, 1 asks the store, 2 waits for a replica, 3 is answered
    events = [(0.0, next(order), 0) for _ in range(setup.in_flight)]
    done, now = 0, 0.0
    while done < requests:
        now, _, step = heapq.heappop(events)
        if step == 0:
            then = link.serve(now, crossing)
        elif step == 1:
            then = store.serve(now, setup.store_s)
        elif step == 2:
            shortest = min(replicas, key=lambda r: r.free_at)
            then = shortest.serve(now, setup.batch_s + setup.batch * setup.image_s)
        else:
            then = link.serve(now, crossing)
            done += 1
        heapq.heappush(events, (then, next(order), (step + 1) % 4))
    return {
        "images_per_s": done * setup.batch / now,
        "replicas_busy": min(1.0, sum(r.busy for r in replicas) / setup.replicas / now),
        "store_busy": min(1.0, store.busy / now),
        "link_busy": min(1.0, link.busy / now),
    }


def main() -> None:
    """Print the figures for 1, 2, 4, ... replicas."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-s", type=float, required=True, help="time of one image on one replica, s")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--store-s", type=float, default=0.0002, help="Redis, for one request")
    parser.add_argument("--link-s", type=float, default=0.0016, help="link, for one image there and back")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 64])
    options = parser.parse_args()
    figures = {}
    for count in options.replicas:
        setup = Setup(
            count,
            4 * count,
            options.batch,
            options.image_s,
            store_s=options.store_s,
            link_s=options.link_s,
        )
        found = simulate(setup, requests=max(2000, 40 * count))
        figures[str(count)] = {name: round(value, 3) for name, value in found.items()}
        hours = 1e6 / found["images_per_s"] / 3600
        print(f"{count} replicas: {figures[str(count)]}, 1 million images in {hours:.2f} h")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
