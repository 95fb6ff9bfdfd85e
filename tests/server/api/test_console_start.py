"""Phantoms for an empty service, and the order of a worklist by suggestion."""

from __future__ import annotations

from typing import Any

import numpy as np


def add(server: Any, worklist: str, file_of: Any, image: np.ndarray, name: str) -> dict[str, Any]:
    """Add an image to a worklist and return the item."""
    answer = server.http.post(
        f"/worklists/{worklist}/items", files={"image": (name, file_of(image))}, data={"name": name}
    )
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_phantoms_fill_an_empty_service_once(server: Any) -> None:
    first = server.http.post("/phantoms")
    assert first.status_code == 201, first.text
    assert (first.json()["images"], first.json()["bank"]) == (12, "phantoms")
    assert server.http.post("/phantoms").json() == first.json()
    bank = server.http.get("/banks/phantoms").json()
    assert (bank["templates"], bank["groups"]) == (3, ["phantom1"])
    items = server.http.get("/worklists/phantoms").json()["items"]
    assert {item["group"] for item in items} == {f"phantom{n}" for n in range(2, 6)}
    assert "phantoms.load" in [line["action"] for line in server.http.get("/audit?count=50").json()]
    server.http.delete("/banks/phantoms")
    server.http.delete("/worklists/phantoms")


def test_open_images_are_ordered_by_what_a_bank_lacks(
    server: Any, bank: str, file_of: Any, example: Any
) -> None:
    server.seed(bank)
    server.http.post("/worklists", json={"name": bank, "bank": bank})
    known = add(server, bank, file_of, example(1)[0], "known.png")
    strange = add(server, bank, file_of, np.tile(np.arange(48, dtype=np.uint8) * 5, (64, 1)), "strange.png")
    done = add(server, bank, file_of, example(5)[0], "done.png")
    server.http.post(f"/worklists/{bank}/items/{done['id']}/decision", json={"decision": "rejected"})
    answer = server.http.post(f"/worklists/{bank}/suggest")
    assert answer.status_code == 200, answer.text
    order = answer.json()["items"]
    assert [one["id"] for one in order] == [strange["id"], known["id"]]
    assert order[0]["gain"] > order[1]["gain"] >= 0
    assert server.http.post(f"/worklists/{bank}/suggest").json() == answer.json()


def test_an_empty_worklist_has_no_order(server: Any, bank: str) -> None:
    server.http.post("/worklists", json={"name": bank, "bank": bank})
    assert server.http.post(f"/worklists/{bank}/suggest").json() == {"items": []}
