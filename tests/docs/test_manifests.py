"""The compose file and the Kubernetes manifests: sound YAML that agrees with the image and the commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
MANIFESTS: list[dict[str, Any]] = [
    found
    for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    for found in yaml.safe_load_all(block)
]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# Modules and programs that a container may start.
PROGRAMS = {"flower-superlink", "flower-superexec", "flower-supernode", "fedmask", "sh"}


def commands() -> list[tuple[str, list[str]]]:
    found = [(name, service["command"]) for name, service in COMPOSE["services"].items() if name != "run"]
    found.append(("run", COMPOSE["services"]["run"]["entrypoint"]))
    return found + [
        (manifest["metadata"]["name"], container["command"])
        for manifest in MANIFESTS
        if manifest["kind"] != "Service"
        for container in manifest["spec"]["template"]["spec"]["containers"]
    ]


@pytest.mark.parametrize(("name", "command"), commands())
def test_what_containers_start_is_there(name: str, command: list[str]) -> None:
    assert all(isinstance(word, str) for word in command), name
    program, *words = command
    if program == "python":
        assert words[0] == "-m"
        assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file()
    else:
        assert program in PROGRAMS
    assert "--insecure" not in " ".join(command)  # TLS everywhere


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["mem_limit"] and service["cpus"]
    assert name == "runs-folder" or not service["user"].startswith("0")
    if service.get("restart"):  # it goes on running
        assert service["healthcheck"]["test"][2:4] == ["-IS", "/code/experiments/healthy.py"]


def test_no_server_mounts_what_clients_keep() -> None:
    mounts = {
        name: {mount.split(":/")[0] for mount in service.get("volumes", ()) if mount.endswith(":/state")}
        for name, service in COMPOSE["services"].items()
    }
    assert mounts["client"] == {"state"}
    assert [name for name, found in mounts.items() if "state" in found] == ["client"]
    assert mounts["server"] and mounts["server"] <= set(COMPOSE["volumes"])


def test_compose_1_29_reads_the_file() -> None:
    assert "name" not in COMPOSE
    assert "version" not in COMPOSE
    for service in COMPOSE["services"].values():
        assert "start_interval" not in service.get("healthcheck", {})
        for needed in service.get("depends_on", {}).values():
            assert set(needed) == {"condition"}


def test_one_service_builds_the_image_and_the_others_wait_for_it() -> None:
    """Several builds of one tag at a time fail in compose 2; 1.29 would look for the image in a registry."""
    services = COMPOSE["services"]
    (builder,) = (name for name, service in services.items() if "build" in service)
    assert set(services[builder]["build"]) == {"context", "network", "args"}
    assert len({service["image"] for service in services.values()}) == 1
    waiting = {builder}
    while (
        more := {name for name, service in services.items() if waiting & set(service.get("depends_on", {}))}
        - waiting
    ):
        waiting |= more
    assert set(services) - waiting == {"run"}  # which asks a federation that is up


def test_build_arguments_are_the_dockerfile_s() -> None:
    known = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.M))
    assert set(COMPOSE["services"]["certs"]["build"]["args"]) <= known
    assert "# syntax=" not in DOCKERFILE
    assert DOCKERFILE.rstrip().splitlines()[-3].startswith("USER 1000")


@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda found: f"{found['kind']}-{found['metadata']['name']}"
)
def test_manifests_are_whole_and_confined(manifest: dict[str, Any]) -> None:
    assert {"apiVersion", "kind", "metadata", "spec"} == set(manifest)
    if manifest["kind"] == "Service":
        return
    if manifest["kind"] == "StatefulSet":
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        assert manifest["spec"]["selector"]["matchLabels"] == labels
    spec = manifest["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in spec["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", [])}
    for container in spec["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        if manifest["kind"] == "StatefulSet":
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"]


def test_there_is_a_manifest_for_each_part() -> None:
    names = {manifest["metadata"]["name"] for manifest in MANIFESTS}
    assert names == {"superlink", "register", "server", "client"}
