"""The files in deploy/cvat: they agree with each other, with the commands' options and with the settings' names."""

import pathlib
import re

import pytest
import yaml

from backends.common.settings import Settings
from backends.cvat_nuclio import contract

ROOT = pathlib.Path(__file__).parents[3]
FILES = sorted((ROOT / "deploy" / "cvat").glob("*.yaml"))
FUNCTIONS = pathlib.Path(contract.__file__).parent


def load(name):
    return list(yaml.safe_load_all((ROOT / "deploy" / "cvat" / name).read_text()))


def test_every_setting_in_them_exists():
    assert len(FILES) == 4
    known = {f"I2F_{name.upper()}" for name in Settings.model_fields} | {"I2F_CVAT_URL", "I2F_MEMORY"}  # of compose
    for path in [*FILES, *FUNCTIONS.glob("*.yaml")]:
        named = set(re.findall(r"I2F_[A-Z_]+", path.read_text()))
        assert named <= known, path.name


def test_the_function_for_kubernetes_differs_in_workers_env_and_resources_alone():
    (function,) = load("function-kubernetes.yaml")
    image = yaml.safe_load((FUNCTIONS / "function-image.yaml").read_text())
    assert function["metadata"] == image["metadata"]
    ours, other = function["spec"], image["spec"]
    for spec in (ours, other):
        for key in ("env", "resources", "platform", "minReplicas", "maxReplicas"):
            spec.pop(key, None)
        spec["triggers"]["http"].pop("maxWorkers")
    assert ours == other


def test_gateway_and_function_name_every_server():
    objects = {(one["kind"], one["metadata"]["name"]): one for one in load("kubernetes.yaml")}
    servers = objects["StatefulSet", "inter2former"]["spec"]
    (service,) = [one for key, one in objects.items() if key == ("Service", "inter2former")]
    port = service["spec"]["ports"][0]["port"]
    expected = [f"http://inter2former-{n}.{servers['serviceName']}:{port}" for n in range(servers["replicas"])]
    (container,) = objects["Deployment", "inter2former-gateway"]["spec"]["template"]["spec"]["containers"]
    replicas = [part.removeprefix("--replica=") for part in container["command"] if part.startswith("--replica=")]
    assert replicas == expected
    (function,) = load("function-kubernetes.yaml")
    env = {one["name"]: one["value"] for one in function["spec"]["env"]}
    assert list(Settings(cvat_servers=env["I2F_CVAT_SERVERS"]).cvat_servers) == expected


def test_nothing_runs_as_root_or_writes():
    for one in load("kubernetes.yaml"):
        if one["kind"] in ("StatefulSet", "Deployment"):
            spec = one["spec"]["template"]["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in spec["containers"])
    for name, service in (("gateway.compose.yaml", "inter2former"), ("agent.compose.yaml", "agent")):
        (compose,) = load(name)
        assert compose["services"][service]["read_only"] is True
        assert compose["services"][service]["cap_drop"] == ["ALL"]
        assert "ports" not in compose["services"][service]  # CVAT cannot log in


@pytest.mark.parametrize(
    "path", [*FUNCTIONS.glob("*.yaml"), *FILES[0].parent.glob("function-*.yaml")], ids=lambda p: p.stem
)
def test_nuclio_may_install_its_own_packages_and_the_function_is_not_root(path):
    """Nuclio's builder runs its pip after every directive of ours, as the user that they leave."""
    spec = yaml.safe_load(path.read_text())["spec"]
    directives = [one for kind in spec["build"].get("directives", {}).values() for one in kind]
    assert [one["value"] for one in directives if one["kind"] == "USER"] == ["root"] * ("baseImage" in spec["build"])
    assert spec["securityContext"] == {"runAsUser": 10001, "runAsGroup": 10001}
    assert "--uid 10001 " in (ROOT / "deploy" / "Dockerfile").read_text()
