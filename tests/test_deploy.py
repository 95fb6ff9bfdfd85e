"""Check the deployment: compose files with all profiles, nginx, the dashboard, the Kubernetes example."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from vessa.redaction.redis_url import with_password
from vessa_server.auth.keys import RedisKeys, Role, create_key
from vessa_server.observability.metrics import Metrics
from vessa_server.settings import Settings
from vessa_server.template_bank.index import Index
from vessa_server.template_bank.store import check_store, open_store

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def compose_config(*files: str) -> dict[str, Any]:
    """Return compose's configuration of some files with all profiles; skip without compose."""
    known = ["docker", "compose", "version"]
    if shutil.which("docker") is None or subprocess.run(known, capture_output=True).returncode:
        pytest.skip("no docker compose on this machine")
    options = [part for name in files for part in ("-f", str(ROOT / name))]
    command = ["docker", "compose", *options, "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("files", [("docker-compose.yml",), ("docker-compose.yml", "docker-compose.gpu.yml")])
def test_compose_reads_all_profiles(files: tuple[str, ...]) -> None:
    config = compose_config(*files)
    services = config["services"]
    assert services.keys() == {
        "redis", "keys", "annotator", "annotator-2", "gateway", "gateway-tls", "phantoms", "trainer", "vllm",
        "prometheus", "grafana",
    }  # fmt: skip
    assert config["networks"]["internal"]["internal"] is True
    for name, service in services.items():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), name
        for port in service.get("ports", []):
            assert name == "gateway-tls" or port["host_ip"] == "127.0.0.1", name


def test_replicas_are_alike_but_for_the_port() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    one, two = services["annotator"], services["annotator-2"]
    differing = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    assert differing == {"ports", "networks", "profiles"}
    listed = re.findall(r"^server (\S+):8700", (DEPLOY / "nginx" / "replicas.conf").read_text(), re.MULTILINE)
    assert listed == ["annotator", "annotator-2"]


def test_nginx_takes_what_the_annotator_takes() -> None:
    conf, settings = (DEPLOY / "nginx" / "nginx.conf").read_text(), Settings()
    body, job, viewer = re.findall(r"client_max_body_size (\d+)m;", conf)
    (read,) = re.findall(r"proxy_read_timeout (\d+)s;", conf)
    wait, viewer_wait = re.findall(r"client_body_timeout (\d+)s;", conf)
    assert settings.limits.max_body_bytes < int(body) << 20
    assert settings.jobs.max_job_bytes < int(job) << 20
    assert settings.limits.request_timeout_s < int(read)
    assert settings.limits.body_timeout_s == int(wait)
    assert settings.viewers.viewer_body_bytes < int(viewer) << 20
    assert settings.viewers.viewer_body_s == int(viewer_wait)
    tls = (DEPLOY / "nginx" / "tls.conf").read_text()
    assert f"client_max_body_size {viewer}m" in tls


def test_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "monitoring/grafana/dashboards/vessa.json").read_text())
    metrics = Metrics()
    metrics.show_annotator(dict, dict)
    exposed = set(re.findall(r"^# TYPE (\S+)", metrics.expose().decode(), re.MULTILINE))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b((?:vessa|process)_[a-z_]+)", target["expr"])
    }
    assert asked
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= exposed
    source = yaml.safe_load(
        (DEPLOY / "monitoring/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["datasources"][0]["uid"]}


def test_kubernetes_example_fits_together() -> None:
    objects = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "vessa.yaml").read_text()))
    by_kind = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    pod = by_kind["Deployment", "annotator"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    environment = {entry["name"] for entry in container["env"]}
    assert {name for name in environment if name.startswith("VESSA_")} <= Settings.variables()
    drain = next(int(e["value"]) for e in container["env"] if e["name"] == "VESSA_DRAIN_S")
    stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain + stop < pod["spec"]["terminationGracePeriodSeconds"]
    claimed = (v["persistentVolumeClaim"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v)
    assert all(("PersistentVolumeClaim", claim["claimName"]) in by_kind for claim in claimed)
    mounted = {m["mountPath"] for m in container["volumeMounts"]}
    values = {e["name"]: e.get("value", "") for e in container["env"]}
    shared = ("VESSA_JOBS_FOLDER", "VESSA_AUDIT_FILE", "VESSA_WORKLISTS_FOLDER")
    assert all(str(Path(values[n]).parent) in mounted for n in shared)
    scaler = by_kind["HorizontalPodAutoscaler", "annotator"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "annotator"
    assert scaler["metrics"][0]["pods"]["metric"]["name"] in Metrics().expose().decode()
    for name in ("annotator", "redis"):
        assert by_kind["Service", name]["spec"]["selector"] == {"app": name}


def test_compose_has_no_secret_with_a_public_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert re.findall(r"\$\{(\w*(?:KEY|TOKEN|PASSWORD|SECRET)):-[^}]+}", text) == []
    command = yaml.safe_load(text)["services"]["vllm"]["entrypoint"]
    command = [part.replace("$$", "$") for part in command]
    refused = subprocess.run([*command, "/language"], env={"PATH": "/usr/bin:/bin"}, capture_output=True)
    assert (refused.returncode, b"set VLLM_API_KEY" in refused.stderr) == (1, True)


def test_images_are_pinned_by_digest() -> None:
    """All but vLLM's, whose digest is unknown here; docker-compose.yml says so beside it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    images = {name: service["image"] for name, service in services.items()}
    built = {name for name, image in images.items() if image in ("vessa-annotator", "vessa-trainer")}
    assert built == {name for name, service in services.items() if "build" in service} | {"annotator-2"}
    pinned = re.compile(r"\$\{[A-Z]+_IMAGE:-[a-z/-]+:[\w.-]+@sha256:[0-9a-f]{64}\}")
    assert {name for name in images.keys() - built if not pinned.fullmatch(images[name])} == {"vllm"}
    kubernetes = (DEPLOY / "kubernetes" / "vessa.yaml").read_text()
    (redis_digest,) = re.findall(r"image: redis:7@(sha256:[0-9a-f]{64})", kubernetes)
    assert redis_digest in images["redis"]
    for name in ("Dockerfile.vessa", "Dockerfile.trainer"):
        assert re.search(
            r"^ARG PYTHON_IMAGE=python:3\.11-slim@sha256:[0-9a-f]{64}$", (ROOT / name).read_text(), re.M
        )


def test_every_service_is_confined_and_no_password_is_in_a_command() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert {"mem_limit", "pids_limit", "cpus"} <= service.keys(), name
        assert "PASSWORD" not in json.dumps(service.get("command", "")), name
    admin = [n for n, s in services.items() if "credentials:/var/lib/vessa/config" in s.get("volumes", [])]
    assert admin == ["annotator", "annotator-2"]


def test_kubernetes_pods_are_confined_and_reach_only_what_they_need() -> None:
    text = (DEPLOY / "kubernetes" / "vessa.yaml").read_text()
    objects = list(yaml.safe_load_all(text))
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert {"annotator", "redis"} <= policies.keys()
    assert "$(REDIS_PASSWORD)" not in text
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            for container in one["spec"]["template"]["spec"]["containers"]:
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_redis_users_reach_their_own_keys_alone(tmp_path: Path, port: int) -> None:
    script = (DEPLOY / "redis" / "start.sh").read_text()
    for place in ("/passwords", "/tmp/users.acl", "/data"):
        script = script.replace(place, f"{tmp_path}{place}")
    script = script.replace("chown", "true").replace("--appendonly yes", f"--appendonly yes --port {port}")
    for folder in ("passwords/annotator", "passwords/trainer", "data", "tmp"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "start.sh").write_text(script)
    server = subprocess.Popen(["sh", str(tmp_path / "start.sh")], stdout=subprocess.DEVNULL)
    try:
        health = redis.Redis(port=port, username="health", password="")
        deadline = time.monotonic() + 20
        while True:
            try:
                assert health.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        address = f"redis://{{}}@127.0.0.1:{port}/0?password_file={tmp_path}/passwords/{{}}/password"
        annotator = address.format("annotator", "annotator")
        assert check_store(annotator) == []
        keys = RedisKeys(annotator)
        create_key(keys, "alice", Role.annotate)
        store = open_store(annotator)
        store.change("b", lambda old: Index(exists=True), {})
        assert store.names() == ["b"]
        trainer = redis.Redis.from_url(with_password(address.format("trainer", "trainer")))
        assert trainer.set("vessa:label:1", "x", px=10_000)
        refused = [
            lambda: trainer.hset("vessa:keys", "evil", "x"),
            lambda: trainer.hgetall("vessa:bank:{b}"),
            lambda: trainer.flushall(),
            lambda: keys._redis.get("vessa:label:1"),
            lambda: keys._redis.config_set("maxmemory", "1"),
            lambda: health.get("vessa:keys"),
        ]
        for call in refused:
            with pytest.raises(redis.exceptions.NoPermissionError):
                call()
    finally:
        server.terminate()
        server.wait(10)
