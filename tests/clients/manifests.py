"""cfn-lint and kubernetes-validate on the deploy files, both offline."""

# needs: cfn-lint==1.58.0 kubernetes-validate==1.37.0

import subprocess
import sys
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
HERE = Path(sys.executable).parent
subprocess.run([HERE / "cfn-lint", DEPLOY / "aws/ecs-express.yaml"], check=True)
# Of kinds that are not Kubernetes' own it knows nothing.
kinds = [path for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")) if path.name != "kustomization.yaml"]
own = [path for path in kinds if path.name not in ("inferenceservice.yaml", "servicemonitor.yaml")]
subprocess.run([HERE / "kubernetes-validate", "--strict", *own], check=True)
