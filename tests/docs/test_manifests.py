"""The compose file and the Kubernetes manifests: sound YAML that agrees with the image and the commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
DOCUMENTS: list[dict[str, Any]] = [
    found
    for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    for found in yaml.safe_load_all(block)
]
MANIFESTS = [found for found in DOCUMENTS if "kind" in found]
(OVERRIDE,) = (found for found in DOCUMENTS if "kind" not in found)  # for docker-compose.override.yml
WITH_PODS = [found for found in MANIFESTS if "template" in found["spec"]]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# Modules and programs that a container may start.
PROGRAMS = {"flower-superlink", "flower-superexec", "flower-supernode", "fedmask", "sh"}
# Where Flower reads the options of its programs.
PARSERS = {
    "flower-superlink": ("flwr.superlink.cli.flower_superlink", "_parse_args_run_superlink"),
    "flower-superexec": ("flwr.supercore.cli.flower_superexec", "_parse_args"),
    "flower-supernode": ("flwr.supernode.cli.flower_supernode", "_parse_args_run_supernode"),
}


def commands() -> list[tuple[str, list[str]]]:
    found = [(name, service["command"]) for name, service in COMPOSE["services"].items() if name != "run"]
    found.append(("run", COMPOSE["services"]["run"]["entrypoint"]))
    return found + [
        (manifest["metadata"]["name"], container["command"])
        for manifest in WITH_PODS
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


def of_flower() -> list[list[str]]:
    """Calls of Flower's long-running programs, in both files and on the pages."""
    lines = [shlex.join(command) if command[0] != "sh" else command[-1] for _, command in commands()]
    for page in ("deployment.md", "engines.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            lines += block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word not in ("exec", "&")]
        if words[:3] == ["python", "-m", "clients.node"]:
            words = ["flower-supernode", *words[3:]]
        if words and words[0] in PARSERS:
            found.append(words)
    return found


def test_flower_knows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    calls = of_flower()
    assert {words[0] for words in calls} == set(PARSERS) and len(calls) >= 12
    for program, *options in calls:
        module, name = PARSERS[program]
        parser: ArgumentParser = getattr(import_module(module), name)()
        try:
            parser.parse_args(options)
        except SystemExit:
            pytest.fail(f"{program} {shlex.join(options)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["mem_limit"] and service["cpus"]
    assert name == "runs-folder" or not service["user"].startswith("0")
    assert service.get("cap_add", []) == (["CHOWN"] if name == "runs-folder" else [])
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


def test_the_image_s_python_and_what_its_code_is_built_with_are_pinned() -> None:
    said = COMPOSE["services"]["certs"]["build"]["args"]["PYTHON"]
    (patch,) = re.findall(r"^ARG PYTHON=(3\.\d+\.\d+)$", DOCKERFILE, re.M)
    assert said == f"${{IMAGE_PYTHON:-{patch}}}"
    # In the environment: pip's option -c does not reach an isolated build.
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    assert ["PIP_CONSTRAINT=/src/constraints.txt" in stage for stage in stages] == [True, True]
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"][
        "requires"
    ]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(re.search(rf"^{re.split('[^a-z]', name)[0]}==", pinned, re.M) for name in required)


def test_the_image_ends_as_an_ordinary_user() -> None:
    assert DOCKERFILE.rstrip().splitlines()[-3].startswith("USER 1000")


def test_what_publishes_the_port_does_so_for_this_machine_alone() -> None:
    """Who reaches the port controls the federation, so that is for a proxy on the same machine."""
    assert OVERRIDE == {"services": {"superlink": {"ports": ["127.0.0.1:8000:8000"]}}}
    assert not any("ports" in service for service in COMPOSE["services"].values())
    command = COMPOSE["services"]["superlink"]["command"]
    assert command[command.index("--port") + 1] == "8000"


def named(found: dict[str, Any]) -> str:
    return f"{found['kind']}-{found['metadata']['name']}"


@pytest.mark.parametrize("manifest", WITH_PODS, ids=named)
def test_manifests_are_whole_and_confined(manifest: dict[str, Any]) -> None:
    assert {"apiVersion", "kind", "metadata", "spec"} == set(manifest)
    name, template = manifest["metadata"]["name"], manifest["spec"]["template"]
    assert template["metadata"]["labels"] == {"app": name}  # which the network's policy goes by
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in spec["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", [])}
    for container in spec["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        for kind in ("requests", "limits"):
            assert set(container["resources"][kind]) == {"memory", "cpu"}
    if manifest["kind"] == "Job":
        assert spec["restartPolicy"] in ("Never", "OnFailure")
        return
    assert manifest["spec"]["selector"]["matchLabels"] == {"app": name}
    (service,) = (
        found for found in MANIFESTS if named(found) == f"Service-{manifest['spec']['serviceName']}"
    )
    assert service["spec"]["selector"] == {"app": name}
    (container,) = spec["containers"]
    probe = container["livenessProbe"]
    assert probe["timeoutSeconds"] >= 5  # Kubernetes waits one second
    if "exec" in probe:  # the container's own check in the compose file, on its own loopback
        assert probe["exec"]["command"] == COMPOSE["services"][name]["healthcheck"]["test"][1:]
    else:
        assert probe["httpGet"]["port"] == container["ports"][0]["containerPort"]


def test_the_network_lets_all_parts_to_the_superlink_and_nobody_else() -> None:
    (policy,) = (found for found in MANIFESTS if found["kind"] == "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app": "superlink"}
    (rule,) = policy["spec"]["ingress"]
    (said,) = rule["from"][0]["podSelector"]["matchExpressions"]
    assert set(said["values"]) == {found["metadata"]["name"] for found in WITH_PODS} - {"superlink"}


def test_clients_agree_with_their_keys_and_the_run() -> None:
    by_name = {found["metadata"]["name"]: found["spec"] for found in WITH_PODS}
    clients = str(by_name["client"]["replicas"])
    command = by_name["run"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--clients") + 1] == clients
    assert f"make --clients {clients} --hosts superlink " in PAGE


def test_there_is_a_manifest_for_each_part() -> None:
    names = {manifest["metadata"]["name"] for manifest in WITH_PODS}
    assert names == {"superlink", "register", "server", "client", "run"}
