"""Ways to start a cluster: valid by the schemas that read them, pinned to our Ray, closed to strangers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

from harness import cli

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHEEL = f"{PROJECT['name'].replace('-', '_')}-*.whl"
CLOUDS = ("aws.yaml", "gcp.yaml")


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def ray_schema() -> Any:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())


def harness_lines(text: str) -> list[list[str]]:
    """Every `harness run ...` in a text, as words."""
    found = re.findall(r"harness run (.*?)(?:'|\"\$@\"|$)", text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line.split("  #")[0]) for line in found]


def check_run(words: list[str]) -> None:
    """Our own command line takes these words."""
    run = typer.main.get_command(cli.app).commands["run"]  # type: ignore[attr-defined]
    run.make_context("run", list(words), resilient_parsing=False)


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_files_are_what_ray_reads(name: str) -> None:
    config = load(name)
    jsonschema.validate(config, ray_schema())
    assert config["head_node_type"] in config["available_node_types"]
    assert config["file_mounts"]["/home/ray/dist"] == "dist"
    assert any(WHEEL in line for line in config["setup_commands"]), "nodes install our wheel"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 1}, ray_schema())


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_keeps_the_token_and_the_dashboard_in(name: str) -> None:
    config = load(name)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in config[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def fields(required: str = "", **types: Any) -> dict[str, Any]:
    """The schema of an object that has these fields and no others; a word is a type."""
    properties = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in types.items()}
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False,
    }  # fmt: skip


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


# what KubeRay 1.7's definition of a RayJob says of all fields of ours and their neighbours: names, types, which must be
QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^\d+(\.\d*)?([KMGTPE]i?|[numk])?$"}]}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
CONTAINER = fields(
    "name", name="string", image="string", imagePullPolicy="string", command=list_of({"type": "string"}),
    args=list_of({"type": "string"}), env={"type": "array"}, resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=list_of(fields("mountPath name", mountPath="string", name="string", readOnly="boolean", subPath="string")),
)  # fmt: skip
VOLUME = fields(
    "name", name="string", emptyDir=fields(medium="string", sizeLimit=QUANTITY),
    persistentVolumeClaim=fields("claimName", claimName="string", readOnly="boolean"),
)  # fmt: skip
POD = fields(
    metadata={"type": "object"},
    spec=fields(
        "containers", containers=list_of(CONTAINER), volumes=list_of(VOLUME), nodeSelector=WORDS, restartPolicy="string",
        serviceAccountName="string", tolerations={"type": "array"},
    ),
)  # fmt: skip
GROUP = {"rayStartParams": WORDS, "resources": WORDS, "labels": WORDS, "template": POD}
CLUSTER_SPEC = fields(
    authOptions=fields(enableK8sTokenAuth="boolean", mode={"enum": ["disabled", "token"]}, secretName="string"),
    autoscalerOptions="object", enableInTreeAutoscaling="boolean", gcsFaultToleranceOptions="object",
    headGroupSpec=fields("template", enableIngress="boolean", headService="object", serviceType="string", **GROUP),
    headServiceAnnotations=WORDS, managedBy="string", rayVersion="string", suspend="boolean", upgradeStrategy="object",
    workerGroupSpecs=list_of(fields(
        "groupName maxReplicas minReplicas template", groupName="string", idleTimeoutSeconds="integer",
        maxReplicas="integer", minReplicas="integer", numOfHosts="integer", replicas="integer", suspend="boolean", **GROUP,
    )),
)  # fmt: skip
RAY_JOB = fields(
    "apiVersion kind metadata spec", apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata="object",
    spec=fields(
        activeDeadlineSeconds="integer", backoffLimit="integer", clusterSelector=WORDS, deletionStrategy="object",
        entrypoint="string", entrypointNumCpus="number", entrypointNumGpus="number", entrypointResources="string",
        jobId="string", managedBy="string", metadata=WORDS, preRunningDeadlineSeconds="integer",
        rayClusterSpec=CLUSTER_SPEC, runtimeEnvYAML="string", shutdownAfterJobFinishes="boolean", submissionMode="string",
        submitterConfig="object", submitterPodTemplate="object", suspend="boolean", ttlSecondsAfterFinished="integer",
    ),
)  # fmt: skip


def changed(tree: Any, path: str, value: Any) -> Any:
    """A copy with a value at a path: "spec.backoffLimit"."""
    name, _, rest = path.partition(".")
    key = int(name) if isinstance(tree, list) else name
    copied = list(tree) if isinstance(tree, list) else dict(tree)
    copied[key] = changed(copied[key], rest, value) if rest else value
    return copied


HEAD = "spec.rayClusterSpec.headGroupSpec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backOffLimit", 3),
        ("spec.backoffLimit", "3"),
        ("spec.rayClusterSpec.authOptions.mode", "none"),
        (f"{HEAD}.rayStartParams.num-cpus", 0),
        (f"{HEAD}.template.spec.containers.0.resources.limits.memory", "16 GB"),
        (f"{HEAD}.template.spec.containers.0.volumeMounts.0", {"name": "shm"}),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", "2"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", {"groupName": "gpu"}),
    ],
)
def test_kuberay_refuses(path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(load("kuberay.yaml"), path, value), RAY_JOB)


@pytest.mark.skipif(
    "KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no ray.io_rayjobs.yaml of KubeRay's"
)
def test_kuberay_job_by_the_whole_definition() -> None:
    crd = yaml.load(Path(os.environ["KUBERAY_CRD"]).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    check_strictly(load("kuberay.yaml"), schema, "")


def check_strictly(value: Any, schema: Any, path: str) -> None:
    """As the API server does with `fieldValidation: Strict`: a field that the definition does not have is an error."""
    jsonschema.validate(value, {k: v for k, v in schema.items() if not k.startswith("x-")})
    known, rest = schema.get("properties", {}), schema.get("additionalProperties")
    for name, item in value.items() if isinstance(value, dict) else ():
        assert name in known or rest or not known, f"{path}.{name}"
        if below := known.get(name, rest if isinstance(rest, dict) else None):
            check_strictly(item, below, f"{path}.{name}")
    for number, item in enumerate(value if isinstance(value, list) else ()):
        check_strictly(item, schema.get("items", {}), f"{path}.{number}")


def test_kuberay_job() -> None:
    job = load("kuberay.yaml")
    jsonschema.validate(job, RAY_JOB)
    spec = job["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    (words,) = harness_lines(" ".join(spec["entrypoint"].split()))
    check_run(words)
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"] * group["replicas"]
    assert words[words.index("--gpus") + 1] == str(gpus)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    assert container["image"] == f"{PROJECT['name']}:{PROJECT['version']}"


def test_every_file_names_one_ray_within_our_pin() -> None:
    (pin,) = [line for line in PROJECT["optional-dependencies"]["train"] if line.startswith("ray[")]
    low, high = re.findall(r"[<>]=?(\d+)\.(\d+)", pin)
    named = {
        "kuberay.yaml": load("kuberay.yaml")["spec"]["rayClusterSpec"]["rayVersion"],
        "aws.yaml": load("aws.yaml")["docker"]["image"],
        "gcp.yaml": load("gcp.yaml")["docker"]["image"],
        "Dockerfile": (CLUSTER / "Dockerfile").read_text(),
    }
    for name, text in named.items():
        (version,) = set(re.findall(r"\b(\d+)\.(\d+)\.\d+(?=-py|$)", text, flags=re.MULTILINE))
        assert tuple(map(int, low)) <= tuple(map(int, version)) < tuple(map(int, high)), name


def test_slurm_script_parses_and_starts_ray_everywhere() -> None:
    path = CLUSTER / "slurm.sh"
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = path.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN=" in text
    # what symmetric-run refuses, and what `ray start` takes on the head alone
    after = text.split("ray symmetric-run")[1].split("-- bash")[0]
    assert not re.search(r"--(head|node-ip-address|port|block|include-dashboard|dashboard-)", after)


STUBS = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "requeued $2" >> "$HOME/calls"; else printf "n1\\nn2\\n"; fi',
    "srun": 'if [[ "$*" == *hostname* ]]; then echo "10.0.0.1 fe80::1"; exit; fi\n'
    'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >> "$HOME/calls"\nexec "${@:4}"',
    # as symmetric-run: what `ray start` says is passed over
    "ray": 'if [ "$1" = stop ]; then rm -f "$HOME/ray-runs"; exit 0; fi\n'
    'if [ -e "$HOME/ray-runs" ]; then echo "Ray is already started on this node."; exit 1; fi\n'
    'if [ -n "$NO_RAY" ]; then echo "ray did not start"; exit 0; fi\n'
    'while [ "$1" != -- ]; do shift; done\nshift\n"$@"',
    "harness": 'trap "echo stopped >> $HOME/calls; exit 130" TERM\necho "harness $*" >> "$HOME/calls"\n'
    'echo "$HARNESS_FORCE_SINCE" >> "$HOME/since"\n'
    'sleep "${SECONDS_OF_RUN:-0}" >/dev/null 2>&1 & wait $!\nexit "${ENDS_WITH:-0}"',
    "python": 'exec python3 "$@"',
}


def start_slurm_script(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The script itself, where Slurm, Ray and the harness only write down how they are called."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "activate").write_text("")
    (folder / "ray-runs").write_text("left by this job before it was requeued")
    for name, body in STUBS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sh"), "--depths", "20", "--out", "/shared/my runs"],
        env={
            "PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "HARNESS_VENV": str(folder),
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "71", "SLURM_GPUS_ON_NODE": "8",
            "TMPDIR": str(folder), **environment,
        },
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [({}, 0, ""), ({"ENDS_WITH": "1"}, 1, ""), ({"NO_RAY": "1"}, 1, "nothing was trained: Ray did not start")],
)
def test_a_slurm_job_ends_as_its_command_did(
    environment: dict[str, str], code: int, says: str, tmp_path: Path
) -> None:
    script = start_slurm_script(tmp_path, **environment)
    _, errors = script.communicate(timeout=60)
    assert (script.returncode, says in errors, bool(errors)) == (code, True, bool(says))
    before, first, *rest = (tmp_path / "calls").read_text().splitlines()
    everywhere = "token 64 --nodes=2 --ntasks=2 --ntasks-per-node=1 ray"
    assert before == f"{everywhere} stop --force"
    assert first.startswith(f"{everywhere} symmetric-run --address 10.0.0.1:20071")
    started = ["harness run --address 10.0.0.1:20071 --depths 20 --out /shared/my runs"]
    assert rest == ([] if says else started)
    assert not list(tmp_path.glob("harness-exit-code*"))


def test_a_slurm_job_is_requeued_before_its_time_limit(tmp_path: Path) -> None:
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    script = start_slurm_script(tmp_path, SECONDS_OF_RUN="50")
    for _ in range(100):
        if (tmp_path / "calls").exists() and "\nharness run" in (tmp_path / "calls").read_text():
            break  # not yet by the words of srun, which name it too
        time.sleep(0.1)
    script.send_signal(signal.SIGUSR1)
    out, _ = script.communicate(timeout=40)
    assert "time limit: requeued" in out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["stopped", "requeued 71"], "its checkpoints are written before Slurm ends the nodes"
    assert script.returncode == 130, "here it goes on to its end; Slurm would have ended it"
    assert not list(tmp_path.glob("harness-exit-code*"))

    # with --force, what it has trained since it began is not trained once more
    time.sleep(1.1)
    for restarts in ("1", "0"):
        script = start_slurm_script(tmp_path, SLURM_RESTART_COUNT=restarts)
        script.communicate(timeout=60)
        assert script.returncode == 0
    first, requeued, another = map(int, (tmp_path / "since").read_text().split())
    assert first == requeued < another
    assert not list(tmp_path.glob(".harness-began*"))


def test_dockerfile_installs_our_wheel() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert any(line.startswith("COPY") and f"dist/{WHEEL}" in line for line in lines)
    assert any(line.startswith("RUN pip install") and WHEEL in line for line in lines)


def test_commands_of_the_page_parse() -> None:
    text = (CLUSTER / "README.md").read_text()
    lines = harness_lines("\n".join(line for line in text.splitlines() if line.startswith("    $ ")))
    assert len(lines) >= 2
    for words in lines:
        check_run(words)
    for name in re.findall(r"cluster/([a-z]+\.(?:yaml|sh)|Dockerfile)", text):
        assert (CLUSTER / name).exists()
