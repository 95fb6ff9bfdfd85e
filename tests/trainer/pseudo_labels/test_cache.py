"""The label cache, in a folder and in a real Redis: it may forget, and never harms."""

import hashlib
import logging
import secrets
import shutil
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import redis

from vessa.client import Prompts
from vessa.errors import InvalidConfig
from vessa_trainer.config import CacheConfig
from vessa_trainer.pseudo_labels import cache
from vessa_trainer.pseudo_labels.cache import FolderCache, RedisCache, label_key, open_cache, pack, unpack
from vessa_trainer.pseudo_labels.types import PseudoLabel


def label_of(seed=0, shape=(7, 11)):
    rng = np.random.default_rng(seed)
    return PseudoLabel(*rng.integers(0, 255, (2, *shape), np.uint8))


def same(one, other):
    return np.array_equal(one.labels, other.labels) and np.array_equal(one.confidence, other.confidence)


def new_key():
    return secrets.token_hex(32)


@pytest.fixture(params=["folder", "redis"])
def cache_of(request, tmp_path, redis_url):
    """Make caches, and a way to put raw bytes behind a key: `cache, poke = cache_of(expire_s=None)`."""
    opened = []

    def make(expire_s=None):
        if request.param == "folder":
            cache = open_cache(CacheConfig(f"folder:{tmp_path / 'cache'}", expire_s))

            def poke(key, change):
                path = tmp_path / "cache" / key[:2] / key
                path.write_bytes(change(path.read_bytes()))
        else:
            cache = open_cache(CacheConfig(redis_url, expire_s))
            store = redis.Redis.from_url(redis_url)
            opened.extend([cache, store])

            def poke(key, change):
                store.set(f"vessa:label:{key}", change(store.get(f"vessa:label:{key}")))

        return cache, poke

    yield make
    for one in opened:
        one.close()


def test_labels_come_back_in_the_order_of_the_keys(cache_of):
    cache, _ = cache_of()
    keys = [new_key() for _ in range(3)]
    labels = {keys[0]: label_of(0), keys[2]: label_of(2, (1, 300))}
    cache.put(labels)
    found = cache.get([keys[2], keys[1], keys[0]])
    assert same(found[0], labels[keys[2]])
    assert found[1] is None
    assert same(found[2], labels[keys[0]])
    assert cache.get([]) == []
    assert cache.failures == 0


def test_two_caches_of_one_place_share_their_labels(cache_of):
    key = new_key()
    cache_of()[0].put({key: label_of()})
    assert same(cache_of()[0].get([key])[0], label_of())


def test_of_two_that_lack_a_label_one_asks(cache_of):
    (one, _), (other, _) = cache_of(), cache_of()
    keys = [new_key() for _ in range(3)]
    assert one.claim(keys[:2]) == set(keys[:2])
    assert other.claim(keys) == {keys[2]}
    assert one.claim(keys[:1]) == set()
    one.release(keys[:2])
    assert other.claim(keys[:2]) == set(keys[:2])
    one.release([])
    assert one.claim([]) == set()


def test_a_claim_of_somebody_who_was_killed_ends(cache_of, monkeypatch):
    monkeypatch.setattr(cache, "_CLAIM_S", 1)
    key = new_key()
    assert cache_of()[0].claim([key]) == {key}
    time.sleep(1.2)
    assert cache_of()[0].claim([key]) == {key}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v[:-1],
        lambda v: v[:20],
        lambda v: b"",
        lambda v: b"VLB1" + v[4:],
        lambda v: v[:-5] + bytes([v[-5] ^ 1]) + v[-4:],
        lambda v: v[:12] + struct.pack("<II", 11, 7) + v[20:],
        lambda v: v + b"x",
    ],
    ids=["cut", "cut short", "empty", "other version", "bit flipped", "other size", "longer"],
)
def test_a_damaged_label_is_a_miss_and_can_be_written_again(cache_of, change):
    cache, poke = cache_of()
    key = new_key()
    cache.put({key: label_of()})
    poke(key, change)
    assert cache.get([key]) == [None]
    cache.put({key: label_of()})
    assert same(cache.get([key])[0], label_of())


def test_labels_expire(cache_of):
    cache, _ = cache_of(expire_s=0.05)
    key = new_key()
    cache.put({key: label_of()})
    time.sleep(0.1)
    assert cache.get([key]) == [None]
    for_ever, _ = cache_of()
    for_ever.put({key: label_of()})
    time.sleep(0.1)
    assert for_ever.get([key])[0] is not None


def signed(body):
    return b"VLB2" + hashlib.sha256(body).digest()[:8] + body


@pytest.mark.parametrize("size", [(7, 11), (40_000, 40_000), (2**32 - 1, 2**32 - 1)])
def test_a_value_that_would_grow_beyond_its_size_is_a_miss(size):
    bomb = signed(struct.pack("<II", *size) + zlib.compress(bytes(1 << 26), 9))
    tracemalloc.start()
    try:
        assert unpack(bomb) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_well_signed_value_that_is_no_label_is_a_miss():
    assert unpack(signed(struct.pack("<II", 7, 11) + b"no deflate stream")) is None
    assert unpack(signed(b"short")) is None
    assert same(unpack(pack(label_of())), label_of())


PROMPTS = Prompts(
    boxes=np.zeros((1, 4), np.float32),
    points=np.zeros((1, 1, 2), np.float32),
    point_labels=np.ones((1, 1), np.int8),
    mask_logits=np.zeros((1, 2, 2), np.float16),
    mask_present=np.ones(1, np.uint8),
)
INGREDIENTS = {
    "image_id": "sha256:1",
    "bank": "acdc",
    "bank_digest": "3" * 64,
    "classes": ["rv", "lv"],
    "group": "p1",
    "prompts": None,
    "model": "m",
    "labels_version": "1",
    "template_choice": "top1",
    "seed": 0,
}


def key_of(**changes):
    ingredients = INGREDIENTS | changes
    return label_key(ingredients.pop("image_id"), **ingredients)


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": "sha256:2"},
        {"bank": "acdc2"},
        {"bank_digest": "4" * 64},
        {"classes": ["lv", "rv"]},
        {"classes": ["rv"]},
        {"group": "p2"},
        {"group": None},
        {"prompts": PROMPTS},
        {"model": "n"},
        {"labels_version": "2"},
        {"template_choice": "top3"},
    ],
    ids=str,
)
def test_the_key_changes_with_each_thing_that_a_label_depends_on(change):
    assert key_of(**change) != key_of()
    assert len(key_of()) == 64


@pytest.mark.parametrize("field", ["boxes", "points", "point_labels", "mask_logits", "mask_present"])
def test_the_key_changes_with_each_prompt(field):
    value = getattr(PROMPTS, field)
    keys = {
        key_of(prompts=PROMPTS),
        key_of(prompts=replace(PROMPTS, **{field: value + 1})),
        key_of(prompts=replace(PROMPTS, **{field: None})),
    }
    assert len(keys) == 3


def test_the_key_is_the_same_for_the_same_prompts_in_another_type():
    boxes = PROMPTS.boxes.astype(np.float64)
    assert key_of(prompts=replace(PROMPTS, boxes=boxes)) == key_of(prompts=PROMPTS)


def test_the_seed_counts_only_where_templates_are_drawn():
    assert key_of(seed=1) == key_of()
    assert key_of(seed=1, template_choice="sample") != key_of(template_choice="sample")


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_redis_that_went_away_and_came_back_is_said_once(own_redis, caplog):
    cache = RedisCache(own_redis.url, None, pause_s=0)
    key = new_key()
    cache.put({key: label_of()})
    own_redis.stop()
    for _ in range(3):
        assert cache.get([key]) == [None]
        cache.put({key: label_of()})
    assert cache.failures == 6
    assert len(warnings_of(caplog)) == 1
    assert "is away" in warnings_of(caplog)[0]
    own_redis.start()
    assert cache.get([key]) == [None]  # this Redis keeps nothing on disk
    cache.put({key: label_of()})
    assert same(cache.get([key])[0], label_of())
    assert cache.failures == 6
    assert warnings_of(caplog)[1:] == ["the label cache in Redis is back"]
    cache.close()


def test_a_redis_that_is_away_is_left_alone_for_a_while(own_redis):
    own_redis.stop()
    cache = RedisCache(own_redis.url, None, pause_s=600)
    assert cache.get(["a", "b"]) == [None, None]
    own_redis.start()
    cache.put({"a": label_of()})
    assert cache.get(["a"]) == [None]
    assert cache.failures == 1
    cache.close()


def test_a_redis_that_refuses_to_store_is_survived_and_said_once(own_redis, caplog):
    with redis.Redis.from_url(own_redis.url) as store:
        cache = RedisCache(own_redis.url, None)
        cache.put({"kept": label_of()})
        store.config_set("maxmemory", "1")
        cache.put({"a": label_of()})
        cache.put({"b": label_of()})
        assert cache.failures == 2
        assert len(warnings_of(caplog)) == 1
        assert "refuses" in warnings_of(caplog)[0]
        assert same(cache.get(["kept"])[0], label_of())
        assert cache.get(["a"]) == [None]
        store.config_set("maxmemory", "0")
        cache.put({"a": label_of()})
        assert same(cache.get(["a"])[0], label_of())
        cache.close()


def test_a_value_of_another_kind_in_redis_is_a_miss(own_redis):
    with redis.Redis.from_url(own_redis.url) as store:
        store.lpush("vessa:label:a", "x")
        cache = RedisCache(own_redis.url, None)
        assert cache.get(["a"]) == [None]
        cache.close()


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, caplog):
    cache = FolderCache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder was")
    cache.put({"aa": label_of()})
    cache.put({"ab": label_of()})
    assert cache.get(["aa"]) == [None]
    assert cache.failures == 3
    assert len(warnings_of(caplog)) == 1
    assert "cannot be written" in warnings_of(caplog)[0]


def test_labels_in_a_folder_are_closed_to_others(tmp_path):
    cache = FolderCache(tmp_path / "cache")
    cache.claim(["aa"])
    cache.put({"ab": label_of()})
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*")}
    assert modes == {"aa": 0o700, ".aa.claim": 0o600, "ab": 0o600}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_deleted_is_made_again(tmp_path):
    cache = FolderCache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    cache.put({"aa": label_of()})
    assert same(cache.get(["aa"])[0], label_of())
    assert [p.name for p in (tmp_path / "cache" / "aa").iterdir()] == ["aa"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("labels", "cache.url must be folder:PATH or redis://HOST:PORT/DB, got 'labels'"),
        ("redis://127.0.0.1:port/0", "cache.url is no Redis address"),
    ],
)
def test_a_place_that_is_none_is_refused(url, message):
    with pytest.raises(InvalidConfig, match=message):
        open_cache(CacheConfig(url))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"the label cache .* cannot be made"):
        open_cache(CacheConfig(f"folder:{tmp_path / 'file' / 'cache'}"))
