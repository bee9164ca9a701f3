"""The scripts of deploy/aliyun, deploy/aws and deploy/gcp: without their SDKs, which only tests/clients installs."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

# What stands for … in the commands that a script's docstring shows.
SCRIPTS = {
    "deploy/aliyun/deploy.py": "",
    "deploy/aws/sagemaker.py": "arn:aws:iam::1:role/r",
    "deploy/gcp/cloud_run.py": "--project P --region R --image I --bucket B",
    "deploy/gcp/vertex.py": "--project P --region R",
}


def load(script: str) -> ModuleType:
    """Import a script."""
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_the_docstring_are_taken(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(script)
    commands = re.findall(r"^    python \S+\.py (.+?)(?:\s+#.*)?$", module.__doc__ or "", re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        arguments = shlex.split(re.sub(r"(?<=\s)…", SCRIPTS[script], command))
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--dry-run"])
        module.main()
        decoder, printed = json.JSONDecoder(), capsys.readouterr().out.strip()
        while printed:
            call, end = decoder.raw_decode(printed)
            assert call["call"]
            printed = printed[end:].strip()


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("deploy/aliyun/deploy.py", "fc-canary 1 2 --weight 500", "the weight is 500; expected percent"),
        ("deploy/aws/sagemaker.py", "shift -- -1", "the weight is -1; expected percent"),
        ("deploy/gcp/cloud_run.py", "update {} --model m --canary 5", "name the revision that serves now"),
        (
            "deploy/gcp/vertex.py",
            "deploy M --endpoint E {} --traffic 5",
            "name the deployed model that gets the others",
        ),
        (
            "deploy/gcp/vertex.py",
            "split D=75 D2=26 --endpoint E {}",
            "D=75 D2=26: expected whole percentages, 100 in sum",
        ),
        ("deploy/gcp/vertex.py", "split D --endpoint E {}", "D: expected whole percentages"),
        ("deploy/gcp/vertex.py", "split D=50 D=50 --endpoint E {}", "D=50 D=50: expected"),
    ],
)
def test_wrong_share_is_explained(script: str, arguments: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = shlex.split(arguments.format(SCRIPTS[script]))
    monkeypatch.setattr(sys, "argv", [script, given[0], "--dry-run", *given[1:]])
    with pytest.raises(SystemExit, match=re.escape(expected)):
        load(script).main()


def test_template_of_ecs_keeps_the_users_to_itself(tmp_path: Path) -> None:
    template = (ROOT / "deploy/aws/ecs-express.yaml").read_text()
    (line,) = re.findall(r"^ +- (\(umask .*) && exec gunicorn$", template, re.MULTILINE)
    path = f"{tmp_path}/users.json"
    script = (
        line.replace("/tmp/users.json", path) + f' && stat -c %a {path} && cat {path} && umask && echo "${{USERS-}}"'
    )
    shown = subprocess.run(
        ["sh", "-c", f"umask 022; {script}"],
        env={"USERS": '{"a%s": 1}', "PATH": "/bin:/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == '600\n{"a%s": 1}0022\n\n'
