"""The floor, twice: gunicorn's gevent worker with a recv and a send per request; a Flask view that does nothing."""

from flask import Flask
from gunicorn.workers.ggevent import GeventWorker

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{"prediction":[0]}'
app = Flask(__name__)


@app.post("/predict")
def predict():
    return {"prediction": [0]}


class Worker(GeventWorker):
    def handle(self, listener, client, addr):
        with client:
            client.setblocking(1)
            while client.recv(65536):  # a small request comes in one piece
                client.sendall(ANSWER)
