"""The InferenceService against KServe's own model classes, which are made of its API's definition.

They take any value, but know each field and its type: a field that does not exist is found, at any depth. What a pod
has as well is checked more strictly by tests/deploy/test_kubernetes.py.
"""

# needs: kserve==0.21.0

import copy
import re
from pathlib import Path
from typing import Any

import kserve
import yaml
from kubernetes.client import models

MANIFEST = Path(__file__).parents[2] / "deploy/kubernetes/kserve/inferenceservice.yaml"


def unknown(kind: str, value: Any, where: str) -> list[str]:
    """Return where a value has fields that its type does not have, or a type other than its own."""
    if inner := re.fullmatch(r"(list\[|dict[\[(]str, )(.*)[\])]", kind, re.IGNORECASE):
        assert isinstance(value, list if kind.lower().startswith("list") else dict), where
        items = enumerate(value) if isinstance(value, list) else value.items()
        return [each for key, item in items for each in unknown(inner[2], item, f"{where}[{key}]")]
    model = getattr(kserve, kind, None) or getattr(models, kind, None)
    if model is None:
        expected = {"str": str, "int": int, "bool": bool, "object": object}[kind]
        return [] if isinstance(value, expected) else [f"{where} is no {kind}"]
    fields = {name: model.openapi_types[field] for field, name in model.attribute_map.items()}
    found = [f"{where}.{name}" for name in value.keys() - fields.keys()]
    for name in value.keys() & fields.keys():
        found += unknown(fields[name], value[name], f"{where}.{name}")
    return found


manifest = yaml.safe_load(MANIFEST.read_text())
assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
assert not (found := unknown("V1beta1InferenceService", manifest, "")), found
wrong = copy.deepcopy(manifest)
predictor = wrong["spec"]["predictor"]
predictor["scaleTraget"], predictor["maxReplicas"] = 70, "10"
predictor["containers"][0]["readinessProbe"]["httpGet"]["prot"] = "http"
assert len(unknown("V1beta1InferenceService", wrong, "")) == 3
print(f"{MANIFEST.name} is as KServe's classes define it")
