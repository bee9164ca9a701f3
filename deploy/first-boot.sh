#!/bin/sh
# Makes a fresh Debian or Ubuntu machine a prediction server: user data for ECS of Alibaba Cloud and EC2, and the start-up
# script of Compute Engine, which runs at every boot and does nothing the second time. docs/clouds.md has the commands.
#
# It holds no key and no password: records are shipped with the machine's RAM role, and the first user is made by hand, once
# you are logged in:
#
#     cd /opt/prediction-server && sudo deploy/systemd/as_service.py -m auth add alice --role predict
#
# The service answers from then on, with the demo model until you publish yours.
set -eu
[ ! -e /etc/systemd/system/prediction-server.service ] || exit 0

# What to change: where the code comes from, and the settings (docs/settings.md).
repository=https://git.example.com/prediction-server.git
cat >/etc/prediction-server.env <<'END'
SLS_ENDPOINT=
SLS_PROJECT=
SLS_LOGSTORE=
SLS_REGION=
END
chmod 600 /etc/prediction-server.env

# From here on as in docs/operations.md, "Production deployment", which also has the certificate.
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -qy curl git nftables nginx openssl python3-venv
id predictions >/dev/null 2>&1 || useradd --system --home-dir /var/lib/prediction-server --shell /usr/sbin/nologin predictions
install -d -o predictions -g predictions -m 750 /var/lib/prediction-server
[ -e /opt/prediction-server-first ] || git clone -q "$repository" /opt/prediction-server-first
cd /opt/prediction-server-first
[ -e var ] || ln -s /var/lib/prediction-server var
python3 -m venv .venv
.venv/bin/pip install -q --require-hashes -r requirements.txt
ln -sfT /opt/prediction-server-first /opt/prediction-server
deploy/systemd/as_service.py -m model.demo

[ -e /etc/ssl/private/prediction-server.key ] || openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj "/CN=$(hostname)" \
    -keyout /etc/ssl/private/prediction-server.key -out /etc/ssl/certs/prediction-server.pem
cp deploy/nginx/prediction-server.conf deploy/nginx/upstream-one-host.conf /etc/nginx/conf.d/
rm -f /etc/nginx/sites-enabled/default
sed -i 's/worker_connections .*/worker_connections 16384;/' /etc/nginx/nginx.conf
cp deploy/nginx/descriptors.conf /etc/nginx/modules-enabled/
cp deploy/nginx/connections.nft /etc/nginx/
nft -f /etc/nginx/connections.nft
install -D -m 644 -t /etc/systemd/system/nginx.service.d deploy/systemd/nginx-connections.conf
nginx -t
systemctl reload nginx

# Last, since these files say that all else is done. Until there is a user the service tries again twice a minute; nobody
# waits for that here.
cp deploy/systemd/prediction-server.socket deploy/systemd/prediction-server.service /etc/systemd/system/
systemctl daemon-reload
systemctl enable --now --no-block prediction-server.socket prediction-server.service
