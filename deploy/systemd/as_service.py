#!/usr/bin/env python3
"""Runs a command of the server as systemd runs the service: with its user, settings and directory.

    sudo deploy/systemd/as_service.py -m auth add alice --role predict

In a release that does not serve yet (docs/upgrades.md) it runs the code of that release.

The service's settings are in a file that only root reads, and its syntax is systemd's, not the shell's.
"""

import os
import pwd
import re
import shlex
import sys
from pathlib import Path

INSTALLED = Path("/etc/systemd/system")

# As in systemd.exec(5), EnvironmentFile=, and systemd's env-file.c (since release 254 a comment ends with its line): a
# comment, or a name and its value. That is quoted strings, and then perhaps one without quotes to the line's end, in
# which a backslash takes the next character.
ENTRY = re.compile(
    r"""[\ \t\r\n]* (?: [#;][^\r\n]* | (?P<name>[^\s#;][^=\r\n]*) (?: =
    (?P<quoted> (?: [\ \t] | '[^']*(?:'|\Z) | "(?:\\.|[^"\\])*\\?(?:"|\Z) )*)
    (?P<plain> (?:\\.|[^\\\r\n])*) )? )""",
    re.DOTALL | re.VERBOSE,
)


def read_environment(text: str) -> dict[str, str]:
    """Read what systemd reads from an EnvironmentFile."""
    found = {}
    for entry in ENTRY.finditer(text):
        name = (entry["name"] or "").rstrip(" \t")
        if entry["quoted"] is None or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            continue
        value = ""
        for single, double in re.findall(r"""'([^']*)'?|"((?:\\.|[^"\\])*)"?""", entry["quoted"], re.DOTALL):
            value += single + re.sub(r'\\(["\\`$])|\\\n', r"\1", double)
        plain = re.fullmatch(r"((?:\\.|[^\\])*?)[ \t]*", entry["plain"], re.DOTALL)
        found[name] = value + re.sub(r"\\\n|\\(.?)", r"\1", plain[1] if plain else "")
    return found


def main(arguments: list[str]) -> None:
    """Become the service's user, and run Python with the arguments."""
    if os.geteuid() != 0 or not arguments:
        sys.exit("usage: sudo deploy/systemd/as_service.py -m MODULE …, such as -m auth list")
    here = Path(__file__).resolve().with_name("prediction-server.service")  # before it is installed
    name = Path(__file__).absolute().parents[2].name
    name = name if name.startswith("prediction-server@") else "prediction-server"  # of a release; see the unit's head
    prefix, at, instance = name.partition("@")
    unit = INSTALLED / f"{prefix}{at}.service"
    changes = sorted(INSTALLED.glob(f"{name}.service.d/*.conf"))
    text = "\n".join(path.read_text("utf-8") for path in (unit if unit.exists() else here, *changes))
    text = text.replace("%N", name).replace("%i", instance)
    directives = re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)
    known = dict(directives)
    user = pwd.getpwnam(known["User"])
    environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": user.pw_dir}
    environ |= {"USER": user.pw_name, "LOGNAME": user.pw_name}
    for name, value in directives:
        if name == "Environment":
            environ |= dict(each.split("=", 1) for each in shlex.split(value))
    for name, value in directives:
        if name == "EnvironmentFile" and (Path(value.lstrip("-")).exists() or value[:1] != "-"):
            environ |= read_environment(Path(value.lstrip("-")).read_text("utf-8"))
    # What the service does not have: of the terminal, and who calls, for the history.
    environ |= {name: os.environ[name] for name in ("TERM", "LANG", "LC_ALL", "SUDO_USER") if name in os.environ}
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.umask(int(known["UMask"], 8))
    python, release = Path(shlex.split(known["ExecStart"])[0]).with_name("python"), here.parents[2]
    if (release / ".venv/bin/python").exists():
        python = release / ".venv/bin/python"
        os.chdir(release)
    else:
        os.chdir(known["WorkingDirectory"])
    os.execve(python, [str(python), *arguments], environ)  # noqa: S606  # no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
