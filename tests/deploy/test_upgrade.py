"""docs/upgrades.md, typed word for word: one release up and back, under load, without a failed request."""

import http.client
import json
import re
import ssl
import threading
import time
from pathlib import Path

import pytest
import runbook
from conftest import ROOT, basic, records
from nginx_tools import needs_nginx, substitute
from test_hosts import Namespace
from test_production import SETUP, host_network, needs_a_host, pids, type_in

UP, UNIT = runbook.commands(__file__, "upgrades.md", "Up")
(BACK,) = runbook.commands(__file__, "upgrades.md", "Back")
(PYTHON,) = runbook.commands(__file__, "upgrades.md", "Another Python")
(LINK,) = runbook.commands(__file__, "upgrades.md", "An installation that is no link yet")
BODY = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'

SHOW = """
set +x
echo; echo "SERVES $(basename "$(readlink /proc/$(cat /run/prediction-server.service.pid)/cwd)")"
set -x
"""

# A host is set up. Then comes a new release, which changes a module, the unit and the Python; then the way back; then
# the host is made one whose /opt/prediction-server is a directory. A reload is refused while the link leads to another
# release than the one that serves.
BEFORE = r"""
git clone -q --no-hardlinks {root} /root/origin
git -C /root/origin checkout -q -B main
git clone -q /root/origin /root/clone
cd /root/clone
{setup}
{show}
cd /root/origin
git config user.email someone@example.com; git config user.name Someone
echo '# A comment.' >> web/callers.py
echo '# Another comment.' >> deploy/systemd/prediction-server.service
git commit -qam "Another release"
cd /root/clone
"""
AFTER = r"""
{show}
grep 'Another comment' /etc/systemd/system/prediction-server.service
systemctl reload prediction-server
ln -sfT "$(readlink -f /opt/prediction-server-before)" /opt/prediction-server
! systemctl reload prediction-server
ln -sfT $release /opt/prediction-server
{back}
{show}
first=$(readlink -f /opt/prediction-server)
rm /opt/prediction-server
mv $first /opt/prediction-server
ln -s /opt/prediction-server $first  # its programs begin with its name
{link}
systemctl restart prediction-server
{show}
"""


class Callers(threading.Thread):
    """Asks one request after the other, as alice and through nginx, from the first that is answered on."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__()
        self._namespace, self.ending = namespace, threading.Event()
        self.statuses: list[int] = []
        self.errors: list[str] = []

    def run(self) -> None:
        """Ask until the event is set."""
        headers = {"Content-Type": "application/json", "Authorization": basic("alice")}
        while not self.ending.wait(0.05):
            try:
                with self._namespace:
                    front = http.client.HTTPSConnection(
                        "127.0.0.1", timeout=60, context=ssl._create_unverified_context()
                    )
                    front.connect()
                front.request("POST", "/predict", BODY, headers)
                answer = front.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                if self.statuses:
                    self.errors.append(repr(error))
            else:
                if self.statuses or answer.status == 200:
                    self.statuses.append(answer.status)
                    assert answer.status != 200 or json.loads(body) == {"prediction": [0]}
            front.close()


@pytest.mark.long
@needs_nginx
@needs_a_host
def test_release_goes_up_and_back_under_load_and_keeps_the_state(tmp_path: Path) -> None:
    restart = 'sudo ln -sfT "$(readlink -f /opt/prediction-server)" /opt/prediction-server-before\n'
    up = substitute(UP, {"python=python3 ": "python=python3.13 ", restart: f"{UNIT}{PYTHON}{restart}"})
    script = BEFORE.format(root=ROOT, setup=SETUP, show=SHOW) + up + AFTER.format(back=BACK, link=LINK, show=SHOW)
    with host_network() as namespace:
        callers = Callers(namespace)
        callers.start()
        try:
            shown = type_in(script, tmp_path, namespace).replace("\r", "")
            time.sleep(1.0)
        finally:
            callers.ending.set()
            callers.join()
        served = re.findall(r"^SERVES (prediction-server-[\w.-]+)$", shown, re.MULTILINE)
        assert len(served) == 4, shown
        assert served[0] == served[2] != served[1]
        assert (served[1].endswith("-python3.13"), served[3]) == (True, "prediction-server-first")
        assert "as it was published" in shown
        assert "FAIL" not in shown
        assert "ok    model: version" in shown
        assert shown.count("would not bring it. Restart instead") == 1
        assert callers.errors == []
        assert set(callers.statuses) == {200}
        (master, *_) = [pid for pid in pids(namespace) if "gunicorn" in Path(f"/proc/{pid}/cmdline").read_text()]
        journal = Path(f"/proc/{master}/root/var/lib/prediction-server/journal")
        answered = [record for record in records(journal) if record.get("user") == "alice" and record["status"] == 200]
        assert len(answered) >= len(callers.statuses)
