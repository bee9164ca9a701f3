#!/bin/sh
# For certbot's --deploy-hook: nginx's certificate and key become those that certbot has just renewed. Not links to certbot's
# own files, whose directory nobody but root may enter: the service reads the certificate to show when it expires.
set -eu
install -m 600 "$RENEWED_LINEAGE/privkey.pem" /etc/ssl/private/prediction-server.key
install -m 644 "$RENEWED_LINEAGE/fullchain.pem" /etc/ssl/certs/prediction-server.pem
nginx -t -q
systemctl reload nginx
