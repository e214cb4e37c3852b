"""The Kubernetes files, against what JobSet and Kubernetes accept.

Always against the fields we use, written down here from the API reference of JobSet v1alpha2. Where
`JOBSET_CRD` names the CustomResourceDefinition of a JobSet release and `jsonschema` is installed,
against that; where `kubernetes-validate` is installed, its strict schemas judge the pods.
"""

import os
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch").glob("*.yaml"))

ACTIONS = {
    *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
}
REASONS = {
    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
    *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
}
JOBSET = {
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "failurePolicy": {
        "maxRestarts": int,
        "rules": [{"name": str, "action": ACTIONS, "onJobFailureReasons": [REASONS]}],
    },
    "replicatedJobs": [
        {
            "name": str,
            "replicas": int,
            "template": {
                "spec": {
                    "parallelism": int,
                    "completions": int,
                    "completionMode": {"Indexed"},
                    "backoffLimit": int,
                    "podFailurePolicy": {
                        "rules": [
                            {
                                "action": {"FailJob"},
                                "onExitCodes": {
                                    "containerName": str,
                                    "operator": {"In"},
                                    "values": [int],
                                },
                            }
                        ]
                    },
                    "template": {"spec": dict},
                }
            },
        }
    ],
}


def load(path):
    return {part["kind"]: part for part in yaml.safe_load_all(path.read_text())}


def problems(value, schema, where="spec"):
    """What of a value is not as the schema has it."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: not a mapping"]
        unknown = [f"{where}.{key}: unknown" for key in value if key not in schema]
        lacking = [f"{where}.{key}: missing" for key in schema if key not in value]
        both = (
            problems(value[key], schema[key], f"{where}.{key}") for key in schema if key in value
        )
        return unknown + lacking + [text for each in both for text in each]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        each = (problems(item, schema[0], f"{where}[{i}]") for i, item in enumerate(value))
        return [text for found in each for text in found]
    if isinstance(schema, set):
        return [] if value in schema else [f"{where}: {value!r} is not one of {sorted(schema)}"]
    return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_fields_are_those_of_jobset(path):
    jobset = load(path)["JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert problems(jobset["spec"], JOBSET) == []


def test_the_check_can_fail():
    spec = load(FILES[0])["JobSet"]["spec"]
    spec["failurePolicy"]["maxRestarts"] = "3"
    job = spec["replicatedJobs"][0]["template"]["spec"]
    job["paralelism"] = job.pop("parallelism")
    spec["failurePolicy"]["rules"][0]["action"] = "Restart"
    found = " ".join(problems(spec, JOBSET))
    for want in ("maxRestarts: '3' is no int", "paralelism: unknown", ".parallelism: missing"):
        assert want in found
    assert "'Restart' is not one of" in found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_names_numbers_and_places_agree(path):
    parts = load(path)
    jobset, policy = parts["JobSet"], parts["NetworkPolicy"]
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    values = {item["name"]: item for item in container["env"]}
    host, port = values["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{subdomain}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert job["parallelism"] == job["completions"] == int(values["JAX_NUM_PROCESSES"]["value"])
    field = values["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # What ends with 75 begins anew however often it happens; anything else a few times.
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [75]
    assert pod["restartPolicy"] == "Never", "Kubernetes asks for it beside a podFailurePolicy"
    assert pod["terminationGracePeriodSeconds"] >= 60
    if "nvidia.com/gpu" in container["resources"]["limits"]:  # NCCL needs more than a pod's 64 MB
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    chosen = {"jobset.sigs.k8s.io/jobset-name": name}
    assert policy["spec"]["podSelector"]["matchLabels"] == chosen
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": chosen}}]}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_jobset_accepts_it(path):
    given = os.environ.get("JOBSET_CRD")
    if not given:
        pytest.skip("JOBSET_CRD names no jobset.x-k8s.io_jobsets.yaml of a JobSet release")
    jsonschema = pytest.importorskip("jsonschema")
    crd = yaml.safe_load(Path(given).read_text())
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2")
    schema = closed(version["schema"]["openAPIV3Schema"])
    judge = jsonschema.Draft202012Validator(schema)
    good = load(path)["JobSet"]
    assert [error.message for error in judge.iter_errors(good)] == []
    bad = load(path)["JobSet"]
    bad["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    assert list(judge.iter_errors(bad)), "it does judge"


def closed(schema):
    """The schema with fields that it does not name refused, as the API server drops them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        keep = schema.get("x-kubernetes-preserve-unknown-fields")
        # `metadata` is described elsewhere: an object without properties stays open.
        made.setdefault("additionalProperties", bool(keep))
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kubernetes_accepts_what_is_its_own(path):
    validate = pytest.importorskip("kubernetes_validate")
    parts = load(path)
    job = parts["JobSet"]["spec"]["replicatedJobs"][0]["template"]
    core = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    for part in (core, parts["NetworkPolicy"]):
        validate.validate(part, "1.31", strict=True)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 9
    with pytest.raises(Exception, match="terminationGracePeriod"):
        validate.validate(core, "1.31", strict=True)
