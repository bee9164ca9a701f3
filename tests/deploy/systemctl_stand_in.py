"""Stands in for systemctl where systemd does not run: does with the installed units what systemd would.

    systemctl_stand_in.py NAMESPACE COMMAND …       within a network namespace of that name

Of a service it applies what could break it: user, directories, descriptors, the socket, the read-only system, hidden
homes and devices, capabilities, system calls. It waits for READY=1, holds the socket, and starts what has ended again.
nginx it starts, or lets it read its files again.
"""

import ctypes
import fcntl
import grp
import os
import pwd
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

UNITS = Path("/etc/systemd/system")
LOG = Path("/var/log/prediction-server.log")
libc = ctypes.CDLL(None, use_errno=True)


def read_unit(file: str) -> dict[str, list[str]]:
    """Read a unit, or a template for an instance, and its drop-ins: its directives, each with its values in order."""
    name, _, kind = file.rpartition(".")
    prefix, at, instance = name.partition("@")
    unit: dict[str, list[str]] = {}
    for path in (UNITS / f"{prefix}{at}.{kind}", *sorted(UNITS.glob(f"{file}.d/*.conf"))):
        for directive, value in re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE):
            unit.setdefault(directive, []).append(value.replace("%N", name).replace("%i", instance))
    return unit


def listen(unit: dict[str, list[str]]) -> Iterator[socket.socket]:
    """Yield the listening sockets of a unit."""
    (group,), (mode,), (backlog,) = (unit[name] for name in ("SocketGroup", "SocketMode", "Backlog"))
    for place in unit["ListenStream"]:
        if place.startswith("/"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(place)
            os.chown(place, 0, grp.getgrnam(group).gr_gid)
            os.chmod(place, int(mode, 8))
        else:
            address, _, port = place.rpartition(":")
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, int(port)))
        listener.listen(int(backlog))
        yield listener


def start(service: str) -> None:
    """Start a service with its socket, and wait until it says that it is ready."""
    listeners = list(listen(read_unit(service.replace(".service", ".socket"))))
    with expecting_ready(service) as told:
        if os.fork() == 0:
            told.close()
            os.setsid()
            log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open("/dev/null", os.O_RDONLY)
            for descriptor, copy in ((null, 0), (log, 1), (log, 2)):
                os.dup2(descriptor, copy)
            pid_file(f"{service}.holder").write_text(str(os.getpid()))
            while True:
                pid = os.fork()
                if pid == 0:
                    run(service, read_unit(service)["ExecStart"][0], listeners)
                pid_file(service).write_text(str(pid))
                os.waitpid(pid, 0)
                time.sleep(0.2)


def stop(service: str) -> None:
    """Stop a service and close its sockets."""
    main = int(pid_file(service).read_text())
    os.kill(int(pid_file(f"{service}.holder").read_text()), signal.SIGKILL)
    end(main, signal.SIGTERM)
    for place in read_unit(service.replace(".service", ".socket"))["ListenStream"]:
        Path(place).unlink(missing_ok=True)


def end(pid: int, how: signal.Signals) -> None:
    """Send a signal, and wait until the process has ended."""
    os.kill(pid, how)
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.1)


def pid_file(service: str) -> Path:
    """Return the file with the pid of a service's main process."""
    return Path(f"/run/{service}.pid")


@contextmanager
def expecting_ready(service: str) -> Iterator[socket.socket]:
    """Wait until the service that was started in the block says that it is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{service}")
        told.settimeout(60)
        yield told
        try:
            assert b"READY=1" in told.recv(4096)
        except TimeoutError:
            sys.exit(f"it did not become ready:\n{LOG.read_text()}")


def reload(service: str) -> None:
    """Run what the unit says, one after the other, as long as that works."""
    main = pid_file(service).read_text()
    for command in read_unit(service)["ExecReload"]:
        pid = os.fork()
        if pid == 0:
            run(service, re.sub(r"\$MAINPID|\$\{MAINPID\}", main, command))
        _, status = os.waitpid(pid, 0)
        if status:
            sys.exit(f"Job for {service} failed because the control process exited with error code.")


def run(service: str, command: str, listeners: Sequence[socket.socket] = ()) -> None:
    """Become a process of the service; `listeners` are the sockets that the main one gets."""
    unit = read_unit(service)
    user = pwd.getpwnam(unit["User"][0])
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": user.pw_dir, "USER": user.pw_name}
    environ |= dict(each.split("=", 1) for each in unit["Environment"])
    if listeners:
        environ |= {"NOTIFY_SOCKET": f"@{service}", "LISTEN_FDS": f"{len(listeners)}", "LISTEN_PID": str(os.getpid())}
    hide_and_protect(unit, user)
    files = int(unit["LimitNOFILE"][0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.umask(int(unit["UMask"][0], 8))
    os.chdir(unit["WorkingDirectory"][0])
    calls = allowed_calls(unit["SystemCallFilter"])
    assert unit["CapabilityBoundingSet"] == [""]
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    assert unit["NoNewPrivileges"] == ["yes"]
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    aside = [fcntl.fcntl(each, fcntl.F_DUPFD, 50) for each in listeners]  # since one may be where another goes
    for number, descriptor in enumerate(aside, 3):
        os.dup2(descriptor, number)
    os.closerange(3 + len(aside), 100)
    filter_calls(calls)
    words = shlex.split(command)
    os.execve(words[0], words, environ)


def hide_and_protect(unit: dict[str, list[str]], user: pwd.struct_passwd) -> None:
    """Give this process a view of the file system as the unit says."""
    wanted = ("ProtectHome", "PrivateTmp", "PrivateDevices")
    assert [unit[name] for name in (*wanted, "ProtectSystem", "ProtectProc")] == [["yes"]] * 3 + [
        ["strict"],
        ["invisible"],
    ]
    assert libc.unshare(0x00020000) == 0  # CLONE_NEWNS
    state = f"/var/lib/{unit['StateDirectory'][0]}"
    os.makedirs(state, exist_ok=True)
    os.chown(state, user.pw_uid, user.pw_gid)
    os.chmod(state, int(unit["StateDirectoryMode"][0], 8))
    script = f"""
        mount --make-rprivate /
        mount --bind {state} {state}
        for home in /home /root; do mount -t tmpfs -o mode=0 tmpfs $home; done
        for tmp in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs $tmp; done
        mount -t tmpfs -o mode=755 tmpfs /dev
        mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5; mknod -m 666 /dev/full c 1 7
        mknod -m 666 /dev/random c 1 8; mknod -m 666 /dev/urandom c 1 9
        mkdir -m 1777 /dev/shm
        mount -t proc -o hidepid=2 proc /proc
        mount -o remount,bind,ro /run
        mount -o remount,bind,ro /
    """
    subprocess.run(["sh", "-ec", script], check=True)


def allowed_calls(filters: list[str]) -> set[str]:
    """Return the system calls that a list of filters allows."""

    def expand(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        told = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
        members = [line.strip() for line in told.stdout.splitlines()[1:]]
        return set().union(*(expand(each) for each in members if each and not each.startswith("#")))

    allowed: set[str] = set()
    for each in filters:
        if each.startswith("~"):
            allowed -= expand(each[1:])
        else:
            allowed |= expand(each)
    return allowed


def filter_calls(calls: set[str]) -> None:
    """Refuse all other system calls with EPERM from now on."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(0x00050000 | 1))  # SCMP_ACT_ERRNO(EPERM)
    for name in calls:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number != -1:  # not known to this version
            seccomp.seccomp_rule_add(context, ctypes.c_uint32(0x7FFF0000), number, 0)  # SCMP_ACT_ALLOW
    assert seccomp.seccomp_load(context) == 0


def main(namespace: str, *arguments: str) -> None:
    """Do what is asked."""
    if "STAND_IN" not in os.environ:
        again = ["ip", "netns", "exec", namespace, sys.executable, __file__, namespace, *arguments]
        os.execvpe("ip", again, os.environ | {"STAND_IN": "1"})
    match arguments:
        case ("daemon-reload",):
            units = [path for path in UNITS.glob("prediction-server.*") if path.is_file()]
            subprocess.run(["systemd-analyze", "verify", *units], check=True)
        case ("enable", "--now", "--no-block", "prediction-server.socket", "prediction-server.service"):
            pass  # it would try for as long as there is no user
        case ("enable" | "start", *_, str(service)) if service.endswith(".service"):
            start(service)
        case ("stop", str(service), str()) if service.endswith(".service"):
            stop(service)
        case ("restart", "prediction-server", "nginx"):
            main(namespace, "restart", "prediction-server")
            end(int(Path("/run/nginx.pid").read_text()), signal.SIGQUIT)
            subprocess.run(["nginx"], check=True)
        case ("restart", "prediction-server"):
            with expecting_ready("prediction-server.service"):
                os.kill(int(pid_file("prediction-server.service").read_text()), signal.SIGTERM)
        case ("reload", "prediction-server"):
            reload("prediction-server.service")
        case ("reload", "nginx"):
            pid = Path("/run/nginx.pid")
            if pid.exists() and pid.read_text():  # `nginx -t` makes an empty one
                children = Path(f"/proc/{int(pid.read_text())}/task/{int(pid.read_text())}/children")
                old = set(children.read_text().split())
                os.kill(int(pid.read_text()), signal.SIGHUP)
                while old & set(children.read_text().split()):  # whoever types is not as quick as a test
                    time.sleep(0.1)
            else:  # Debian starts it when it is installed
                subprocess.run(["nginx"], check=True)
        case _:
            sys.exit(f"no stand-in for systemctl {shlex.join(arguments)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
